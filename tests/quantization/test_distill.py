"""The loss: what labels, teacher and guidance each give to it."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from guidance import by_definition
from qvit import DistillationLoss, QuantConfig, calibrate, quantize
from qvit.errors import ConfigError, TeacherMismatchError, UnsupportedModelError
from qvit.models.queries import attention_layers, run_with_queries
from qvit.quantization.distill import check_guidance, guided_distance

DISTILLED = "deit_tiny_distilled_patch16_224"


def calibrated(teacher: nn.Module, images: Tensor, config: QuantConfig | None = None) -> nn.Module:
    student = quantize(teacher, config)
    calibrate(student, [images])
    return student


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Mean of -log softmax at the label, in float64 NumPy."""
    z = logits.detach().double().numpy()
    z = z - z.max(axis=1, keepdims=True)
    log_softmax = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return float(-np.mean([row[label] for row, label in zip(log_softmax, labels.tolist(), strict=True)]))


def queries_and_keys(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What enters the two products, read off by hooks of this test's own: all queries, then all keys."""
    seen: dict[str, list[Tensor]] = {"q": [], "k": []}
    handles = []
    for layer in attention_layers(model):
        for kind, name in (("q", "query"), ("k", "key")):
            source = getattr(layer, f"{name}_rectifier", None) or getattr(layer, f"{kind}_norm")
            handles.append(source.register_forward_hook(lambda m, a, out, kind=kind: seen[kind].append(out)))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen["q"] + seen["k"]


@pytest.mark.parametrize("rectifier", [None, "head", "token"])
def test_distillation_part_is_hard_label_cross_entropy(vit: nn.Module, images, labels, rectifier) -> None:
    student = calibrated(vit, images, QuantConfig(rectifier=rectifier)).train()
    loss_fn = DistillationLoss(vit, guided=False)
    loss = loss_fn(student, images, labels)
    logits = student(images)
    hard = vit(images).argmax(dim=1)
    assert not torch.equal(hard, labels)
    expected = 0.5 * cross_entropy(logits, labels) + 0.5 * cross_entropy(logits, hard)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(loss_fn.last_parts["logits"], logits)
    assert not loss_fn.last_parts["logits"].requires_grad


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_soft_distillation_is_the_divergence_from_the_teacher_and_takes_no_label(
    make_model, images: Tensor, labels: Tensor, name: str
) -> None:
    teacher = make_model()
    student = calibrated(make_model(name, img_size=16), images)
    if name.startswith("deit"):
        student.set_distilled_training(True)
    loss = DistillationLoss(teacher, soft=True, guided=False)
    found = loss(student.train(), images, labels)
    assert torch.equal(found, loss(student, images, labels.flip(0) + 1))
    outputs = student(images)
    p = teacher(images).double().softmax(dim=1)
    heads = outputs if isinstance(outputs, tuple) else (outputs,)
    expected = [(p * (p.log() - q.double().log_softmax(dim=1))).sum(dim=1).mean() for q in heads]
    assert found.item() == pytest.approx(sum(part.item() for part in expected) / len(heads), rel=1e-4)
    found.backward()
    assert student.blocks[0].attn.qkv.weight.grad.abs().max() > 0


def test_distillation_token_learns_from_the_teacher_and_class_token_from_the_label(make_model, images, labels) -> None:
    teacher = make_model()
    student = calibrated(make_model(DISTILLED), images, QuantConfig(rectifier="token"))
    student.set_distilled_training(True)
    student.train()
    loss = DistillationLoss(teacher, guided=False)(student, images, labels)
    cls_logits, dist_logits = student(images)
    assert not torch.allclose(cls_logits, dist_logits)
    expected = 0.5 * cross_entropy(cls_logits, labels) + 0.5 * cross_entropy(dist_logits, teacher(images).argmax(1))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert student.head.weight.grad.abs().max() > 0
    assert student.head_dist.weight.grad.abs().max() > 0


@pytest.mark.parametrize("rectifier", [None, "head", "token"])
def test_guided_part_is_the_papers_sum_over_lambda_mapping(vit: nn.Module, images, labels, rectifier) -> None:
    student = calibrated(vit, images, QuantConfig(3, 3, rectifier=rectifier)).train()
    weight, layers, heads = 0.7, 2, 2
    loss_fn = DistillationLoss(vit, guided_weight=weight)
    loss = loss_fn(student, images, labels)
    teacher_qk, student_qk = queries_and_keys(vit, images), queries_and_keys(student, images)
    assert len(teacher_qk) == len(student_qk) == 2 * layers
    if rectifier == "token":  # every row of the teacher's normalised alike, without gamma and beta
        teacher_qk = [
            (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt() for x in teacher_qk
        ]
    # the paper: sum over layers and heads of the query's and the key's distance, mean over the batch
    paper_sum = sum(by_definition(t, s).mean(0).sum() for t, s in zip(teacher_qk, student_qk, strict=True)).item()
    paper_lambda = weight / (2 * layers * heads)
    guided = loss.item() - DistillationLoss(vit, guided=False)(student, images, labels).item()
    assert paper_sum > 0.1
    assert guided == pytest.approx(paper_lambda * paper_sum, rel=5e-3)
    assert loss_fn.last_parts["guided"].item() == pytest.approx(paper_sum / (2 * layers * heads), rel=5e-3)


def test_token_reading_is_recognised_inside_a_wrapper(vit: nn.Module, images, labels) -> None:
    """DistributedDataParallel and the like hide the student's attributes."""
    student = calibrated(vit, images, QuantConfig(rectifier="token")).train()
    loss_fn = DistillationLoss(vit)
    plain = loss_fn(student, images, labels)
    torch.testing.assert_close(loss_fn(nn.Sequential(student), images, labels), plain, rtol=0, atol=0)


def test_a_student_with_the_teachers_queries_has_no_guided_part(vit: nn.Module, images, labels) -> None:
    loss_fn = DistillationLoss(vit)
    loss_fn(copy.deepcopy(vit).train(), images, labels)
    assert loss_fn.last_parts["guided"].item() == 0


def test_guided_part_reaches_the_query_and_key_weights_of_every_layer(vit: nn.Module, images, labels) -> None:
    student = calibrated(vit, images).train()
    loss_fn = DistillationLoss(vit, guided_weight=1.0)
    gradients = []
    for guided in (True, False):
        loss_fn.guided = guided
        student.zero_grad()
        loss_fn(student, images, labels).backward()
        gradients.append([block.attn.qkv.weight.grad.clone() for block in student.blocks])
    for with_guidance, without in zip(*gradients, strict=True):
        width = with_guidance.shape[0] // 3
        assert not torch.allclose(with_guidance[: 2 * width], without[: 2 * width], atol=1e-6)
    # values of the last layer take no part in it
    assert torch.allclose(gradients[0][-1][2 * width :], gradients[1][-1][2 * width :], atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "numbers"),
    [({"depth": 3}, "3 attention layers, the student 2"), ({"num_heads": 3}, "3 heads, the student 2")],
)
def test_teacher_of_other_depth_or_heads_is_refused_with_both_numbers(make_model, images, labels, kwargs, numbers):
    student = calibrated(make_model(), images)
    teacher = make_model(**kwargs)
    with pytest.raises(TeacherMismatchError, match=numbers):
        DistillationLoss(teacher)(student, images, labels)
    with pytest.raises(TeacherMismatchError, match=numbers):
        check_guidance(teacher, student)
    # without guidance any teacher will do
    assert torch.isfinite(DistillationLoss(teacher, guided=False)(student, images, labels))


@pytest.mark.parametrize("guided", [True, False])
def test_teacher_of_other_classes_is_refused_with_both_numbers(make_model, images, labels, guided: bool) -> None:
    student = calibrated(make_model(), images)
    with pytest.raises(TeacherMismatchError, match="7 classes, the student 10"):
        DistillationLoss(make_model(num_classes=7), guided=guided)(student, images, labels)


def test_teacher_of_other_width_is_welcome(make_model, images, labels) -> None:
    student = calibrated(make_model(), images)
    loss_fn = DistillationLoss(make_model(embed_dim=40))  # head dimension 20 against 12
    assert torch.isfinite(loss_fn(student, images, labels))
    assert 0 < loss_fn.last_parts["guided"] < math.sqrt(2)


@pytest.mark.parametrize("frozen", [True, False])
def test_teacher_is_untouched_by_quantize_and_by_the_loss(make_model, images, labels, frozen: bool) -> None:
    teacher = make_model().requires_grad_(not frozen)
    state = copy.deepcopy(teacher.state_dict())
    types = [type(module) for module in teacher.modules()]
    student = calibrated(teacher, images).train()
    loss_fn = DistillationLoss(teacher)
    loss_fn.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    loss_fn(student, images, labels).backward()
    optimizer.step()
    assert [type(module) for module in teacher.modules()] == types
    assert state.keys() == teacher.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
    assert all(p.requires_grad is not frozen and p.grad is None for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert not teacher.training
    assert not torch.equal(student.blocks[0].attn.qkv.weight, teacher.blocks[0].attn.qkv.weight)


def test_queries_and_keys_are_what_enters_the_product(vit: nn.Module, images: Tensor) -> None:
    student = calibrated(vit, images).eval()
    for model in (vit, student):
        logits, queries, keys = run_with_queries(model, images)
        assert torch.equal(logits, model(images))
        assert all(x.shape == (16, 2, 17, 12) for x in queries + keys)
        for got, expected in zip(queries + keys, queries_and_keys(model, images), strict=True):
            assert torch.equal(got, expected)


def kept_bytes(loss_fn: DistillationLoss, student: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Return the bytes of all that a step keeps for the backward pass, weights apart, each piece of memory once."""
    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_fn(student, images, labels)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("rectifier", [None, "head", "token"])
@pytest.mark.parametrize("layers", [None, [-1]])
def test_guidance_keeps_the_guided_layers_queries_and_keys_of_the_teacher_alone(
    vit: nn.Module, images: Tensor, labels: Tensor, rectifier: Literal["head", "token"] | None, layers: list[int] | None
) -> None:
    student = calibrated(vit, images, QuantConfig(rectifier=rectifier)).train()
    guided, plain = (
        kept_bytes(DistillationLoss(vit, guided=guided, guided_layers=layers), student, images, labels)
        for guided in (True, False)
    )
    _, queries, keys = run_with_queries(vit, images)
    teachers = sum(4 * x.numel() for x in queries + keys) // (1 if layers is None else len(queries))
    assert guided - plain == pytest.approx(teachers, abs=200)  # of scalars


def test_models_are_looked_through_once(
    vit: nn.Module, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, another = (calibrated(vit, images).train() for _ in range(2))
    loss_fn = DistillationLoss(vit)
    loss_fn(student, images, labels)
    walks, named_modules = [], nn.Module.named_modules

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        walks.append(self)
        return named_modules(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    loss_fn(student, images, labels).backward()
    assert not walks
    another.head = nn.Linear(24, 10)
    with pytest.raises(UnsupportedModelError, match="head"):
        loss_fn(another, images, labels)
    assert walks


BACKEND = "aot_eager"  # traces as inductor does, without the minute of C++ compilation


def test_compiled_teacher_and_student_neither_break_nor_recompile(vit: nn.Module, images, labels) -> None:
    student = calibrated(vit, images).train()
    loss_fn = DistillationLoss(vit)
    expected = loss_fn(student, images, labels).item()
    guided = loss_fn.last_parts["guided"].item()
    torch.compiler.reset()
    vit.compile(fullgraph=True, backend=BACKEND)
    student.compile(fullgraph=True, backend=BACKEND)
    loss_fn(student, images, labels).backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            loss = loss_fn(student, images, labels)
            loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert loss_fn.last_parts["guided"].item() == pytest.approx(guided, rel=1e-3)


def test_no_query_leaves_a_compiled_student(make_model, images: Tensor, labels: Tensor) -> None:
    vit = make_model(depth=1)
    student = calibrated(vit, images).train()
    left: list[Tensor] = []

    def look(graph: Any, example_inputs: list[Any]) -> Any:
        def run(*args: Any) -> Any:
            outputs = graph(*args)
            left.extend(outputs)
            return outputs

        return run

    torch.compiler.reset()
    student.compile(fullgraph=True, backend=look)
    DistillationLoss(vit)(student, images, labels)
    assert sorted(x.ndim for x in left) == [0, 0, 2]  # distances of queries and keys, logits


def test_compiled_models_are_guided_after_they_have_run_alone(make_model, images, labels) -> None:
    vit = make_model(depth=1)
    student = calibrated(vit, images).train()
    expected = DistillationLoss(vit)(student, images, labels).item()
    torch.compiler.reset()
    for model in (vit, student):
        model.compile(fullgraph=True, backend=BACKEND)
    for _ in range(2):
        with torch.no_grad():
            vit(images)  # as the loss runs it, but for the queries that it asks for
        student(images)
        assert DistillationLoss(vit)(student, images, labels).item() == pytest.approx(expected, rel=1e-4)


def test_guidance_reaches_the_weights_of_checkpointed_blocks(vit: nn.Module, images, labels) -> None:
    student = calibrated(vit, images, QuantConfig(rectifier="token")).train()
    gradients = []
    for checkpointing in (False, True):
        student.set_grad_checkpointing(checkpointing)
        student.zero_grad()
        DistillationLoss(vit, guided_weight=10.0)(student, images, labels).backward()
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("cause", ["frozen", "reentrant"])
def test_guidance_without_a_gradient_is_refused(vit: nn.Module, images, labels, cause: str) -> None:
    student = calibrated(vit, images, QuantConfig(rectifier=None)).train()
    if cause == "frozen":
        student.requires_grad_(False)
        student.head.requires_grad_(True)
    student.set_grad_checkpointing(cause == "reentrant")
    reentrant = timm.layers.config.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(cause == "reentrant")
    try:
        with pytest.raises(ConfigError, match="reaches no weight of the student"):
            DistillationLoss(vit)(student, images, labels)
    finally:
        timm.layers.set_reentrant_ckpt(reentrant)
    assert torch.isfinite(DistillationLoss(vit, guided=False)(student, images, labels))


def test_loss_falls_in_a_few_steps(vit: nn.Module, images, labels) -> None:
    student = calibrated(vit, images, QuantConfig(3, 3)).train()
    loss_fn = DistillationLoss(vit)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = loss_fn(student, images, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_lambda_falls_along_a_cosine_if_asked_to(vit: nn.Module, images: Tensor) -> None:
    student, labels = calibrated(vit, images), torch.zeros(len(images), dtype=torch.int64)
    loss_fn = DistillationLoss(vit, guided_weight=0.8, guided_decay=True)
    for progress, factor in ((0.0, 1.0), (1 / 3, 0.75), (0.5, 0.5), (1.0, 0.0)):
        loss_fn.progress = progress
        total = loss_fn(student, images, labels).item()
        parts = loss_fn.last_parts
        assert total == pytest.approx(float(parts["distillation"] + 0.8 * factor * parts["guided"]), rel=1e-6)
    constant = DistillationLoss(vit, guided_weight=0.8)
    constant.progress = 1.0
    assert constant.present_weight == 0.8


def test_only_the_chosen_layers_are_guided(vit: nn.Module, images: Tensor) -> None:
    student, labels = calibrated(vit, images), torch.zeros(len(images), dtype=torch.int64)
    every = [guided_distance(t, s).mean() for t, s in zip(
        queries_and_keys(vit, images), queries_and_keys(student, images), strict=True
    )]  # fmt: skip
    depth = len(every) // 2
    for chosen, layers in (([0], [0]), ([-1], [depth - 1]), ([-depth], [0]), ([-1, 0], [0, depth - 1])):
        loss_fn = DistillationLoss(vit, guided_layers=chosen)
        loss_fn(student, images, labels)
        expected = torch.stack([every[layer + offset] for offset in (0, depth) for layer in layers]).mean()
        torch.testing.assert_close(loss_fn.last_parts["guided"], expected)
    with pytest.raises(ConfigError, match=f"no attention layer {depth} to guide: the teacher has {depth}"):
        DistillationLoss(vit, guided_layers=[depth])
