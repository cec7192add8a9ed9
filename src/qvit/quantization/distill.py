"""Distillation: DeiT's hard labels, and Q-ViT's distribution guided one, DGD (docs/method.md, sections 1 and 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvit.config import check_number
from qvit.errors import ConfigError, ModeError, TeacherMismatchError
from qvit.models.queries import Place, attention_layers, attention_places, recording, run_watched
from qvit.nn.recompute import recomputed, recomputed_when_compiled
from qvit.nn.rectifier import EPS, TokenRectifier
from qvit.quantization.convert import check_quantized, check_values
from qvit.quantization.outputs import output_distance

GUIDED_WEIGHT = 0.1
"""Default lambda; see :class:`DistillationLoss` for what it multiplies."""


def guided_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Return ``|| G_T - G ||_F`` for every image and head, without building the N x N matrices ``G``.

    With ``A = teacher (..., N, D_T)`` and ``B = student (..., N, D)``, ``G = B B^T / ||B B^T||_F`` and

        ||G_T - G||_F^2 = 2 - 2 ||A^T B||_F^2 / (||A^T A||_F ||B^T B||_F)

    which costs O(N D^2) time and O(D^2) memory beside its arguments. The root is that of the square plus the precision
    of the dtype, less the root of that precision: the distance is exactly 0 and its gradient finite where student and
    teacher agree.

    Args:
        teacher: queries or keys ``(B, H, N, D_T)``; float32 or wider arithmetic whatever the dtype.
        student: ``(B, H, N, D)``.

    Returns:
        ``(B, H)`` distances, each between 0 and sqrt(2).
    """
    # Copied once here, or every product of heads that lie between one another in memory would copy them for itself.
    a, b = ((x if x.dtype == torch.float64 else x.float()).contiguous() for x in (teacher, student))
    with torch.autocast(a.device.type, enabled=False):
        products = [a.transpose(-2, -1) @ b, _Gram.apply(a), _Gram.apply(b)]
        # Their size is taken out before they are squared, so that the fourth powers stay in range. The distance does
        # not depend on the size of its arguments, so neither does the gradient flow through it.
        size_a, size_b = (_inverse_size(x) for x in products[1:])
        scales = (size_a * size_b, size_a * size_a, size_b * size_b)
        cross, aa, bb = ((x * s).square().sum(dim=(-2, -1)) for x, s in zip(products, scales, strict=True))
        # The root of the product, not the product of the roots: exactly `cross` where a is b. With traces of D, both
        # factors are at least 1; below that is only an argument that is all zero, at distance sqrt(2).
        squared = (2 - 2 * cross / torch.sqrt((aa * bb).clamp(min=0.25))).clamp(min=0)
        eps = torch.finfo(squared.dtype).eps
        return torch.sqrt(squared + eps) - eps**0.5


class _Gram(torch.autograd.Function):
    """``x^T x``; one product in the backward pass where that of two different factors takes two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.transpose(-2, -1) @ x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,), (x,) = grads, ctx.saved_tensors
        return x @ (grad + grad.transpose(-2, -1))


@torch.no_grad()
def _inverse_size(gram: Tensor) -> Tensor:
    """Return what ``x`` is to be multiplied with for the trace of its ``x^T x (..., D, D)`` to be D."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    return torch.rsqrt(mean + torch.finfo(gram.dtype).tiny)


class DistillationLoss(nn.Module):
    """``L = L_dist + lambda * L_DGD`` (docs/method.md, section 3).

    ``L_dist`` is the mean of two cross-entropies: the class logits against the label, and the distillation logits (the
    same logits, if the student has no distillation token) against the class that the teacher chooses.

    With ``soft`` it is the divergence of the student's probabilities from the teacher's (the mean over both heads, if
    there are two), and the labels are not used (docs/method.md, section 7).

    ``L_DGD`` is the mean of :func:`guided_distance` over images, layers, heads and over queries and keys, so one
    ``guided_weight`` suits a model of any depth. The paper sums over L layers, H heads, queries and keys: its lambda
    is ``guided_weight / (2 L H)``.

    Args:
        teacher: a float model; it is put in evaluation mode and never trained.
        soft: whether the student learns the teacher's probabilities in place of labels and the teacher's choice.
        guided: whether ``L_DGD`` is part of the loss.
        guided_weight: lambda.
        guided_decay: whether lambda falls to 0 along a cosine over the training, as the learning rate does.
        guided_layers: indices of the attention layers that are compared, negative ones from the end; ``None`` for all.

    Call it as ``loss_fn(student, images, labels)``; ``last_parts`` then holds the terms and the logits, detached.

    Raises:
        ConfigError: if the teacher has no such layer, or ``guided_weight`` is no number from 0 up.
        UnsupportedModelError: if the teacher is on the meta device.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        soft: bool = False,
        guided: bool = True,
        guided_weight: float = GUIDED_WEIGHT,
        guided_decay: bool = False,
        guided_layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_number("guided_weight", guided_weight, above_zero=False)
        check_values(teacher)
        self.teacher = teacher.eval()
        self.soft = soft
        self.guided, self.guided_weight, self.guided_decay = guided, guided_weight, guided_decay
        self._teacher_places = attention_places(teacher)
        depth = len(self._teacher_places)
        if guided_layers is not None and not guided_layers:
            raise ConfigError("guided_layers names no layer: leave it out for all of them, or give guided=False.")
        for layer in guided_layers or ():
            if not -depth <= layer < depth:
                raise ConfigError(f"There is no attention layer {layer} to guide: the teacher has {depth}.")
        self.guided_layers = set(range(depth)) if guided_layers is None else {layer % depth for layer in guided_layers}
        self._student: _Student | None = None
        self.progress = 0.0
        """Share of the training that is done, for ``guided_decay``."""
        self.last_parts: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> DistillationLoss:
        """Do nothing: the teacher stays in evaluation mode."""
        return self

    def forward(self, student: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of ``student`` on ``images (B, C, H, W)`` with class numbers ``labels (B,)``.

        Raises:
            TeacherMismatchError: if classes, layers or heads of teacher and student differ.
            ConfigError: if the guided distance has no gradient where the other term has one.
            UnsupportedModelError: if a float layer was put into a quantized student before it is first given.
            ModeError: if the student is in evaluation mode while gradients are on, or the teacher in training mode.
        """
        known = self._student
        if known is None or known.model is not student or known.guided != self.guided:
            self._student = known = _Student(student, self.teacher, guided=self.guided)
        if torch.is_grad_enabled() and not known.is_training:
            raise ModeError(
                "The student is in evaluation mode, where the statistics of its rectifiers do not move: call "
                "student.train() before training it, or use torch.no_grad() to measure the loss alone."
            )
        if self.teacher.training:
            raise ModeError("The teacher is in training mode: call teacher.eval(), it is not what is trained.")
        with torch.no_grad():  # not inference mode: the student's gradients are products with the teacher's queries
            teacher_logits, queries, keys = self._run_teacher(images)
        logits, distances = self._run_student(known, images, queries, keys)
        class_logits, distillation_logits = logits if isinstance(logits, tuple) else (logits, logits)
        if teacher_logits.shape[-1] != class_logits.shape[-1]:
            raise TeacherMismatchError(
                f"The teacher has {teacher_logits.shape[-1]} classes, the student {class_logits.shape[-1]}."
            )
        if self.soft:
            losses = [
                output_distance(part, teacher_logits, classes=True) for part in (class_logits, distillation_logits)
            ]
            loss = torch.stack(losses).mean()
        else:
            loss = 0.5 * F.cross_entropy(class_logits.float(), labels) + 0.5 * F.cross_entropy(
                distillation_logits.float(), teacher_logits.argmax(dim=-1)
            )
        self.last_parts = {"logits": class_logits.detach(), "distillation": loss.detach()}
        if self.guided:
            guided = torch.stack(distances).mean()
            if loss.requires_grad and not guided.requires_grad:
                raise ConfigError(
                    "The guided distance reaches no weight of the student: its query and key weights are frozen, or "
                    "timm checkpoints its blocks in PyTorch's reentrant way (timm.layers.set_reentrant_ckpt(False))."
                )
            self.last_parts["guided"] = guided.detach()
            loss = loss + self.present_weight * guided
        return loss

    @property
    def present_weight(self) -> float:
        """Lambda at the present ``progress``."""
        decay = 0.5 * (1 + math.cos(math.pi * self.progress)) if self.guided_decay else 1.0
        return self.guided_weight * decay

    def _run_teacher(self, images: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the teacher's logits, and queries and keys of the guided layers, with nothing else kept alive."""
        queries: list[Tensor] = []
        keys: list[Tensor] = []
        places = self._guided(self._teacher_places)
        watched = {"query_rectifier": recording(queries), "key_rectifier": recording(keys)}
        logits = run_watched(self.teacher, images, watched, places)
        # Heads lie between one another in memory, and values between them: copies, which the distance would make.
        return logits, [x.contiguous() for x in queries], [x.contiguous() for x in keys]

    def _run_student(
        self, student: _Student, images: Tensor, queries: list[Tensor], keys: list[Tensor]
    ) -> tuple[Any, list[Tensor]]:
        """Return the student's logits, and its mean distances to the teacher's queries, then to its keys."""
        of_queries: list[_Distance] = []
        of_keys: list[_Distance] = []
        normalised = student.normalised
        watched = {
            "query_rectifier": partial(_Guided, guides=iter(queries), normalised=normalised, distances=of_queries),
            "key_rectifier": partial(_Guided, guides=iter(keys), normalised=normalised, distances=of_keys),
        }
        logits = run_watched(student.model, images, watched, self._guided(student.places))
        return logits, [x if isinstance(x, Tensor) else x() for x in of_queries + of_keys]

    def _guided(self, places: list[Place]) -> list[Place]:
        return [place for layer, place in enumerate(places) if self.guided and layer in self.guided_layers]


_Distance = Tensor | Callable[[], Tensor]


class _Student:
    """What the loss has found out about a student, which it looks through once and not at every step.

    Raises:
        UnsupportedModelError: if a float layer was put into a quantized student.
        TeacherMismatchError: see :func:`check_guidance`.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, *, guided: bool) -> None:
        check_quantized(model)
        if guided:
            check_guidance(teacher, model)
        self.model, self.guided = model, guided
        self.places = attention_places(model)
        self.normalised = any(isinstance(module, TokenRectifier) for module in model.modules())

    @property
    def is_training(self) -> bool:
        """Whether the student is in training mode, whatever the mode of a wrapper around it."""
        return self.model.training and (not self.places or any(place.module.training for place in self.places))


class _Guided(nn.Module):
    """A student's rectifier, whose outputs are compared with the teacher's queries or keys."""

    def __init__(
        self, source: nn.Module, guides: Iterator[Tensor], *, normalised: bool, distances: list[_Distance]
    ) -> None:
        super().__init__()
        self.source, self.guide, self.normalised, self.distances = source, next(guides), normalised, distances

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.source(x)
        distance = partial(_mean_distance, normalised=self.normalised)
        if torch.compiler.is_compiling():
            # As part of the student's code: no query has to leave it, and none of their gradients waits for it.
            self.distances.append(recomputed_when_compiled(distance, self.guide, output))
        else:
            # After the student has run: checkpointed blocks run again in the backward pass, without this module.
            self.distances.append(partial(recomputed, distance, self.guide, output))
        return output


def _mean_distance(teacher: Tensor, student: Tensor, *, normalised: bool) -> Tensor:
    if normalised:
        # Every row of q~ has nearly the same norm: compare with the teacher's rows normalised alike.
        teacher = F.layer_norm(teacher.float(), teacher.shape[-1:], eps=EPS)
    return guided_distance(teacher, student).mean()


def check_guidance(teacher: nn.Module, student: nn.Module) -> None:
    """Raise unless DGD can compare the two models layer by layer and head by head (head dimensions may differ).

    Raises:
        TeacherMismatchError: saying what differs.
    """
    teacher_heads, student_heads = ([layer.num_heads for layer in attention_layers(m)] for m in (teacher, student))
    if len(teacher_heads) != len(student_heads):
        raise TeacherMismatchError(
            f"Distribution guided distillation compares layer by layer: the teacher has {len(teacher_heads)} attention "
            f"layers, the student {len(student_heads)}. Use a teacher of the same depth, or train without guidance."
        )
    for layer, (a, b) in enumerate(zip(teacher_heads, student_heads, strict=True)):
        if a != b:
            raise TeacherMismatchError(
                f"Distribution guided distillation compares head by head: in layer {layer} the teacher has {a} heads, "
                f"the student {b}. Use a teacher with as many heads, or train without guidance."
            )
