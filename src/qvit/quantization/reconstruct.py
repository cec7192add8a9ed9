"""Reconstruction: a calibrated student learns to give what its float model gives, on pictures without labels.

All weights, scales and offsets are trained together on the distance of the outputs (docs/method.md, section 9). The
pictures are few, so every step sees views of them that were not there before.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvit.errors import ConfigError, DataError, NonFiniteLossError, TeacherMismatchError, UncalibratedError
from qvit.nn.modes import evaluating
from qvit.nn.quantizer import Quantizer
from qvit.quantization.convert import check_quantized

LEARNING_RATE = 1e-3
_OF_SIZE = 10
"""How many times the learning rate a step of weights and the like is, by their root mean square."""
_SMALLEST = 2.0**-6
"""Root mean square that smaller parameters, such as biases of zeros, are taken to have."""
BATCH_SIZE = 32
WARMUP = 0.05
"""Fraction of the budget in which the learning rate rises; from there it falls along a cosine to 0."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of each parameter."""
_TIMED = 3
"""Steps after the first, which warms up, by which the duration of a step is known."""
_MARGIN = 0.95
"""Fraction of the time that is planned with: a step may take longer than the first ones did."""
_SHIFT = 1 / 8
"""Largest shift of a picture in a view, as a fraction of its sides."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a reconstruction has come.

    Args:
        step: steps done.
        steps: steps in all; with a budget of time ``None`` until the duration of a step is known.
        seconds: time taken, that before an interruption included.
        fraction: of the budget, 0..1.
        loss: mean over the last steps, of :func:`output_distance`.
        images_per_second: over all steps.
    """

    step: int
    steps: int | None
    seconds: float
    fraction: float
    loss: float
    images_per_second: float


Report = Callable[[Progress], None]


def reconstruct(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    minutes: float | None = None,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    precision: str = "no",
    compile: bool = False,
    report: Report | None = None,
) -> Progress:
    """Train a calibrated student, in place, to give what ``teacher`` gives; labels are not needed.

    Every module is left in the mode it was found in. If it fails, all weights and scales are what they were before;
    after Ctrl-C they are those of the last finished step.

    Args:
        student: what :func:`qvit.quantize` returned, calibrated (:func:`qvit.calibrate`).
        teacher: the float model that it was made of, on the same device.
        batches: image tensors ``(B, C, H, W)``, or tuples that start with one; some hundred images or more, prepared as
            for evaluation. All are held in memory.
        steps: how many steps of ``batch_size`` images are made.
        minutes: instead of ``steps``, how long it may take. The number of steps follows from the duration of the
            first ones; give that number as ``steps`` to make the same student again.
        batch_size: images a step.
        learning_rate: of the scales, which are trained as their logarithms; ten times as much of all else, by the root
            mean square of its values.
        seed: of the order of the images and of their views.
        precision: ``"no"`` for float32, ``"bf16"`` for autocast.
        compile: whether to ``torch.compile`` both models meanwhile: slower to start, faster to run.
        report: called after every step.

    Returns:
        How far it came: how many steps, in what time, at what loss.

    Raises:
        ConfigError: unless either ``steps`` or ``minutes`` is given, or for a value that cannot be meant.
        UncalibratedError: if a quantizer has no scale.
        UnsupportedModelError: if a float layer was put into the student.
        TeacherMismatchError: if the outputs of teacher and student have other shapes.
        DataError: if there are no images.
        NonFiniteLossError: if the loss becomes NaN or infinite.
    """
    run = Reconstruction(
        student,
        teacher,
        batches,
        steps=steps,
        minutes=minutes,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        precision=precision,
        compile=compile,
    )
    before = copy.deepcopy(student.state_dict())
    try:
        return run.go_on(report or (lambda progress: None))
    except Exception:
        student.load_state_dict(before)
        raise


class Reconstruction:
    """A reconstruction that can be saved and gone on with; arguments and errors as of :func:`reconstruct`."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        batches: Iterable[Any],
        *,
        steps: int | None = None,
        minutes: float | None = None,
        batch_size: int = BATCH_SIZE,
        learning_rate: float = LEARNING_RATE,
        seed: int = 0,
        precision: str = "no",
        compile: bool = False,
    ) -> None:
        if (steps is None) == (minutes is None):
            raise ConfigError("Reconstruction needs a budget: give either steps or minutes.")
        for name, value in (("steps", steps), ("batch_size", batch_size)):
            if value is not None and not (type(value) is int and value >= 1):
                raise ConfigError(f"{name} must be a whole number from 1 up, not {value!r}.")
        for name, amount in (("minutes", minutes), ("learning_rate", learning_rate)):
            if amount is not None and not (math.isfinite(amount) and amount > 0):
                raise ConfigError(f"{name} must be a number above 0, not {amount!r}.")
        if precision not in ("no", "bf16"):
            raise ConfigError(f"precision must be no or bf16, not {precision!r}.")
        _check_student(student)
        images = [batch[0] if isinstance(batch, (tuple, list)) else batch for batch in batches]
        self.images = torch.cat([batch.cpu() for batch in images]) if images else torch.empty(0)
        if not len(self.images):
            raise DataError("Reconstruction needs at least one image, and there was none.")
        self.student, self.teacher = student, teacher
        self.steps, self.minutes, self.batch_size, self.precision = steps, minutes, batch_size, precision
        self.compile = compile
        self.optimizer = torch.optim.Adam(_parameter_groups(student, learning_rate), foreach=True)
        self.generator = torch.Generator().manual_seed(seed)
        self.step, self.seconds, self.losses = 0, 0.0, [math.nan]

    def state_dict(self) -> dict[str, Any]:
        """Return all that :meth:`load_state_dict` needs to go on, beside the student's weights."""
        return {
            "moments": {name: {key: state[key] for key in _MOMENTS} for name, state in self._states()},
            "generator": self.generator.get_state(),
            "step": self.step,
            "steps": self.steps,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where ``state`` was taken; the student's weights have to be those of that time.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: for what is no such state; nothing has changed then.
        """
        step, steps, seconds, moments = state["step"], state["steps"], state["seconds"], state["moments"]
        generator = torch.Generator()
        generator.set_state(state["generator"])
        whole = [step, *([] if steps is None and self.minutes is not None else [steps])]
        if not all(type(count) is int and 1 <= count < 2**48 for count in whole) or not 0 <= float(seconds) < math.inf:
            raise ValueError("no number of steps, or no time")
        if self.minutes is None and steps != self.steps:
            raise ValueError("another number of steps")
        learned = self._learned()
        if not isinstance(moments, dict) or moments.keys() != learned.keys():
            raise ValueError("other parameters")
        if not all(isinstance(own, dict) for own in moments.values()):
            raise ValueError("no moments by name")
        for name, parameter in learned.items():
            for key in _MOMENTS:
                _check_like(moments[name][key], parameter)
        for name, parameter in learned.items():
            own = {key: moments[name][key].to(parameter.device, copy=True) for key in _MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **own}
        self.generator, self.step, self.steps, self.seconds = generator, step, steps, float(seconds)

    def _learned(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.student.named_parameters() if parameter.requires_grad}

    def _states(self) -> list[tuple[str, dict[str, Tensor]]]:
        return [(name, self.optimizer.state[parameter]) for name, parameter in self._learned().items()]

    def go_on(self, report: Report) -> Progress:
        """Make all the steps that are left of the budget."""
        learned = list(self._learned().values())
        began, before, first = time.perf_counter(), self.seconds, self.step
        durations: list[float] = []
        with evaluating(self.student, self.teacher), _compiled(self.student, self.teacher, wanted=self.compile):
            while self.fraction < 1:
                for group in self.optimizer.param_groups:
                    group["lr"] = group["peak"] * _rate(self.fraction, self.steps)
                loss = self._make_step(learned)
                self.step += 1
                self.losses = [*self.losses[-49:], loss]
                now = before + time.perf_counter() - began
                durations.append(now - self.seconds)
                self.seconds = now
                if self.steps is None and self.step - first > _TIMED:
                    self.steps = self._steps_in_time(min(durations[1:]))
                report(self.progress())
        self.optimizer.zero_grad(set_to_none=True)
        return self.progress()

    @property
    def fraction(self) -> float:
        """Of the budget that is spent: the more of steps and time, 0..1."""
        of_steps = self.step / self.steps if self.steps is not None else 0.0
        of_time = self.seconds / (60 * self.minutes) if self.minutes is not None else 0.0
        return min(1.0, max(of_steps, of_time))

    def progress(self) -> Progress:
        """Return how far it has come."""
        losses = [loss for loss in self.losses if not math.isnan(loss)]
        return Progress(
            self.step,
            self.steps,
            self.seconds,
            self.fraction,
            sum(losses) / len(losses) if losses else math.nan,
            self.step * self.batch_size / max(self.seconds, 1e-9),
        )

    def _steps_in_time(self, duration: float) -> int:
        assert self.minutes is not None
        left = _MARGIN * 60 * self.minutes - self.seconds
        return max(self.step, self.step + int(left / duration))

    def _make_step(self, learned: Sequence[Tensor]) -> float:
        device = learned[0].device
        chosen = torch.randint(len(self.images), (self.batch_size,), generator=self.generator)
        images = views(self.images[chosen], self.generator).to(device)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with autocast, torch.no_grad():
            wanted = self.teacher(images)
        with autocast, torch.enable_grad():
            loss = output_distance(self.student(images), wanted, classes=_classifies(self.teacher))
        gradients = torch.autograd.grad(loss, learned, allow_unused=True)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"The loss of the reconstruction became NaN or infinite in step {self.step + 1}: give a lower learning "
                "rate; the model is what it was before."
            )
        for parameter, gradient in zip(learned, gradients, strict=True):
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
        self.optimizer.step()
        return value


def output_distance(student: Tensor, teacher: Tensor, *, classes: bool) -> Tensor:
    """Return the mean distance of two outputs ``(B, C)``, a scalar.

    For logits the Kullback-Leibler divergence of the student's probabilities from the teacher's, in nats; for the
    vectors of a feature extractor the squared distance by the variance of the teacher's vectors about their mean.

    Raises:
        TeacherMismatchError: if the shapes differ.
    """
    if student.shape != teacher.shape:
        raise TeacherMismatchError(
            f"The student gives {tuple(student.shape)}, the teacher {tuple(teacher.shape)}: the teacher must be the "
            "float model that the student was made of."
        )
    student, teacher = student.float(), teacher.float()
    if classes:
        log_probabilities = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
        return F.kl_div(*log_probabilities, log_target=True, reduction="batchmean")
    spread = (teacher - teacher.mean(dim=0)).square().mean() if len(teacher) > 1 else teacher.square().mean()
    return F.mse_loss(student, teacher) / spread.clamp(min=torch.finfo(spread.dtype).tiny)


def views(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return views of ``images (B, C, H, W)``: each mirrored or not, all shifted, half of them mixed with another one.

    Nothing here has to keep what a label says, for the teacher is asked about the view itself.
    """
    count, (height, width) = len(images), images.shape[-2:]
    mirrored = torch.rand(count, generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    pads = [min(round(side * _SHIFT), side - 1) for side in (height, width)]
    top, left = (int(torch.randint(2 * pad + 1, (), generator=generator)) for pad in pads)
    padded = F.pad(images, (pads[1], pads[1], pads[0], pads[0]), mode="reflect")
    images = padded[..., top : top + height, left : left + width]
    weights = 0.5 * torch.rand(count, generator=generator) * (torch.rand(count, generator=generator) < 0.5)
    return torch.lerp(images, images.flip(0), weights[:, None, None, None])


@contextmanager
def _compiled(*models: nn.Module, wanted: bool) -> Iterator[None]:
    """Let models run compiled within the block, if that is ``wanted``."""
    if wanted:
        torch.compiler.reset()  # of earlier models nothing is left: a class is compiled for so many of them and no more
        for model in models:
            model.compile()
    try:
        yield
    finally:
        for model in models if wanted else ():
            model._compiled_call_impl = None


def _parameter_groups(student: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """Return a group per size of step: a scale's logarithm moves as it is, all else in proportion to its values.

    Sizes are rounded to powers of two, for an optimizer's groups are to be few.
    """
    peaks: dict[float, list[Tensor]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            peak = learning_rate
            if not name.endswith(".log_scale"):
                size = max(float(parameter.detach().float().square().mean().sqrt()), _SMALLEST)
                peak *= _OF_SIZE * 2.0 ** round(math.log2(size))
            peaks.setdefault(peak, []).append(parameter)
    return [{"params": parameters, "lr": 0.0, "peak": peak} for peak, parameters in peaks.items()]


def _rate(fraction: float, steps: int | None) -> float:
    """Return the learning rate at a fraction of the budget, as a fraction of its peak; of the first step not 0."""
    risen = min(1.0, (fraction + (1 / steps if steps else 1e-3)) / WARMUP)
    return risen * (0.5 + 0.5 * math.cos(math.pi * fraction))


def _classifies(model: nn.Module) -> bool:
    return int(getattr(model, "num_classes", 0)) > 0


def _check_like(value: Any, parameter: Tensor) -> None:
    kind = type(value) is Tensor and (value.shape, value.dtype) == (parameter.shape, parameter.dtype)
    if not kind or value.layout != torch.strided or value.is_meta or not bool(torch.isfinite(value).all()):
        raise ValueError("no moments of its gradients")


def _check_student(student: nn.Module) -> None:
    quantizers = {name: module for name, module in student.named_modules() if isinstance(module, Quantizer)}
    if not quantizers:
        raise ConfigError("This model has no quantizers to reconstruct: pass what qvit.quantize returned.")
    for name, quantizer in quantizers.items():
        if not quantizer.calibrated:
            raise UncalibratedError(f"{name} has no scale yet: call qvit.calibrate(model, batches) first.")
    check_quantized(student)
