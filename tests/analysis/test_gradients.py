from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qvit import DistillationLoss, QuantConfig, calibrate, quantize
from qvit.analysis.gradients import loss_gradients
from qvit.errors import DataError
from qvit.models.queries import attention_layers, run_with_queries
from qvit.quantization.distill import guided_distance

LABELS = torch.tensor([0, 1, 2, 3])


@pytest.fixture
def student(vit, images):
    student = quantize(vit, QuantConfig(4, 4))
    calibrate(student, [images])
    with torch.no_grad():  # away from the teacher, where guidance has something to do
        for layer in attention_layers(student):
            layer.qkv.weight.mul_(1 + 0.3 * torch.randn(layer.qkv.weight.shape, generator=torch.manual_seed(0)))
    return student


def test_norms_are_those_of_each_term_alone(vit, images, student):
    images = images[: len(LABELS)]
    result = loss_gradients(student, DistillationLoss(vit, guided_weight=0.7), [(images, LABELS)])

    student.train()
    weights = [layer.qkv.weight for layer in attention_layers(student)]
    logits, queries, keys = run_with_queries(student, images)
    with torch.no_grad():
        teacher_logits, their_queries, their_keys = run_with_queries(vit, images)
    labels = 0.5 * (F.cross_entropy(logits, LABELS) + F.cross_entropy(logits, teacher_logits.argmax(-1)))
    pairs = zip(their_queries + their_keys, queries + keys, strict=True)
    guided = 0.7 * torch.stack([guided_distance(t, s).mean() for t, s in pairs]).mean()
    for index, weight in enumerate(weights):
        expected = [torch.autograd.grad(term, weight, retain_graph=True)[0] for term in (labels, guided)]
        a, b = (grad[: 2 * len(grad) // 3].flatten().double() for grad in expected)
        assert result[index].layer == index
        assert result[index].labels == pytest.approx(float(a.norm()), rel=1e-3)
        assert result[index].guided == pytest.approx(float(b.norm()), rel=1e-3)
        assert result[index].cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-3)


def test_gradients_are_means_over_batches_and_leave_everything_as_it_was(vit, images, student):
    loss_fn = DistillationLoss(vit, guided_weight=0.5)
    batches = [(images[:4], LABELS), (images[4:8], LABELS)]
    before = {name: value.clone() for name, value in student.state_dict().items()}
    both = loss_gradients(student, loss_fn, batches)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert loss_fn.guided_weight == 0.5
    assert all(parameter.grad is None for parameter in student.parameters())
    alone = [loss_gradients(student, loss_fn, [batch])[1].guided for batch in batches]
    # The running averages that the second batch meets after the first play no part in training.
    assert both[1].guided == pytest.approx(sum(alone) / 2, rel=1e-4)


def test_no_batch_is_an_error(vit, student):
    with pytest.raises(DataError, match="at least one batch"):
        loss_gradients(student, DistillationLoss(vit), [])
