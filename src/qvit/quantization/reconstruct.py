"""Reconstruction: a calibrated student learns to give what its float model gives, on pictures without labels.

All weights, scales and offsets are trained together on the distance of the outputs (docs/method.md, section 9). The
pictures are few, so every step sees views of them that were not there before.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qvit.config import check_count, check_number
from qvit.errors import ConfigError, NonFiniteLossError, UncalibratedError
from qvit.format.fields import is_whole
from qvit.models.families import classifies
from qvit.nn.modes import compiled, evaluating
from qvit.nn.quantizer import Quantizer
from qvit.nn.state import is_finite, why_not_like
from qvit.quantization.convert import check_quantized, check_values
from qvit.quantization.outputs import joined, output_distance, views

LEARNING_RATE = 1e-3
_OF_SIZE = 10
"""How many times the learning rate a step of weights and the like is, by their root mean square."""
_SMALLEST = 2.0**-6
"""Root mean square that smaller parameters, such as biases of zeros, are taken to have."""
BATCH_SIZE = 32
WARMUP = 0.05
"""Fraction of the budget in which the learning rate rises; from there it falls along a cosine to 0."""
_LOSSES = 50
"""Losses of the last steps, whose mean is reported."""
_COUNTS = ("step", "steps", "seconds", "planned_at")
_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of each parameter."""
_TIMED = 3
"""Steps after the first, which warms up, by which the duration of a step is known."""
_MARGIN = 0.95
"""Fraction of the time that is planned with: a step may take longer than the first ones did."""


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
        on_time: whether the steps alone have set the learning rate: then as many ``steps`` make the same student again.
    """

    step: int
    steps: int | None
    seconds: float
    fraction: float
    loss: float
    images_per_second: float
    on_time: bool


Report = Callable[[Progress], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the result depends on beside models and images; see :func:`reconstruct`.

    Raises:
        ConfigError: unless either ``steps`` or ``minutes`` is given, or for a value that cannot be meant.
    """

    steps: int | None = None
    minutes: float | None = None
    batch_size: int = BATCH_SIZE
    learning_rate: float = LEARNING_RATE
    seed: int = 0
    precision: str = "no"
    compile: bool = False

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ConfigError("Reconstruction needs a budget: give either steps or minutes.")
        for name, value in (("steps", self.steps), ("batch_size", self.batch_size)):
            if value is not None:
                check_count(name, value)
        for name, amount in (("minutes", self.minutes), ("learning_rate", self.learning_rate)):
            if amount is not None:
                check_number(name, amount, above_zero=True)
        if self.precision not in ("no", "bf16"):
            raise ConfigError(f"precision must be no or bf16, not {self.precision!r}.")


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
    after Ctrl-C they are those of the step that it was in.

    Args:
        student: what :func:`qvit.quantize` returned, calibrated (:func:`qvit.calibrate`).
        teacher: the float model that it was made of, on the same device.
        batches: image tensors ``(B, C, H, W)``, or tuples that start with one; some hundred images or more, prepared as
            for evaluation. All are held in memory.
        steps: how many steps of ``batch_size`` images are made.
        minutes: instead of ``steps``, how long it may take. How many steps that is follows from the duration of some
            that are made first, at a learning rate of 0. If the machine then becomes slower, the rate falls with time.
        batch_size: images per step.
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
        DataError: if there are no images, or what there is are no images of one size.
        NonFiniteLossError: if the loss becomes NaN or infinite.
    """
    settings = Settings(steps, minutes, batch_size, learning_rate, seed, precision, compile)
    run = Reconstruction(student, teacher, batches, settings)
    before = copy.deepcopy(student.state_dict())
    try:
        return run.go_on(report or (lambda progress: None))
    except Exception:
        student.load_state_dict(before)
        raise


class Reconstruction:
    """A reconstruction that can be saved and gone on with; models, batches and errors as of :func:`reconstruct`."""

    def __init__(self, student: nn.Module, teacher: nn.Module, batches: Iterable[Any], settings: Settings) -> None:
        _check_student(student)
        check_values(teacher)
        self.student, self.teacher, self.settings = student, teacher, settings
        self.images = joined(batches)
        self.peaks = _peaks(self._learned(), settings.learning_rate)
        self.step, self.steps = 0, settings.steps
        self.seconds, self.planned_at, self.on_time = 0.0, 0.0, True
        self.losses: list[float] = []
        self._begin()

    def _begin(self) -> None:
        groups: dict[float, list[Tensor]] = {}
        for name, parameter in self._learned().items():
            groups.setdefault(self.peaks[name], []).append(parameter)
        self.optimizer = torch.optim.Adam(
            [{"params": parameters, "lr": 0.0, "peak": peak} for peak, parameters in groups.items()], foreach=True
        )
        self.generator = torch.Generator().manual_seed(self.settings.seed)

    def state_dict(self) -> dict[str, Any]:
        """Return all that :meth:`load_state_dict` needs to go on after a step, beside the student's weights."""
        return {
            "moments": {
                name: {key: self.optimizer.state[parameter][key] for key in _MOMENTS}
                for name, parameter in self._learned().items()
            },
            "generator": self.generator.get_state(),
            "losses": list(self.losses),
            **{name: getattr(self, name) for name in _COUNTS},
            "on_time": self.on_time,
            "peaks": dict(self.peaks),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where ``state`` was taken; the student's weights have to be those of that time.

        Raises:
            AttributeError, KeyError, TypeError, ValueError, RuntimeError: for what is no such state; nothing has
                changed then.
        """
        step, steps, *times = (state[name] for name in _COUNTS)
        moments, peaks, losses, on_time = (state[name] for name in ("moments", "peaks", "losses", "on_time"))
        generator = torch.Generator()
        generator.set_state(state["generator"])
        if not all(is_whole(count, 1, 2**48) for count in (step, steps)):
            raise ValueError("no number of steps")
        if not all(map(is_finite, times)) or min(times) < 0 or type(on_time) is not bool:
            raise ValueError("no time")
        if self.settings.minutes is None and steps != self.steps:
            raise ValueError("another number of steps")
        if not isinstance(losses, list) or len(losses) > _LOSSES or not all(map(is_finite, losses)):
            raise ValueError("no losses")
        learned = self._learned()
        if not all(isinstance(state, dict) and state.keys() == learned.keys() for state in (moments, peaks)):
            raise ValueError("other parameters")
        if not all(map(is_finite, peaks.values())) or not all(isinstance(pair, dict) for pair in moments.values()):
            raise ValueError("no moments or rates by name")
        for name, parameter in learned.items():
            if any(why_not_like(moments[name][key], parameter) for key in _MOMENTS):
                raise ValueError("no moments of its gradients")
        self.peaks = dict(peaks)
        self._begin()
        for name, parameter in learned.items():
            moved = {key: moments[name][key].to(parameter.device, copy=True) for key in _MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moved}
        self.generator, self.losses, self.on_time = generator, list(losses), on_time
        self.step, self.steps, self.seconds, self.planned_at = step, steps, *times

    def _learned(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.student.named_parameters() if parameter.requires_grad}

    def go_on(self, report: Report) -> Progress:
        """Make all the steps that are left of the budget."""
        learned = list(self._learned().values())
        began = time.perf_counter() - self.seconds
        try:
            with (
                evaluating(self.student, self.teacher),
                compiled(self.student, self.teacher, wanted=self.settings.compile),
            ):
                if self.steps is None:
                    self._plan(learned, began)
                while self.fraction < 1:
                    for group in self.optimizer.param_groups:
                        group["lr"] = group["peak"] * _rate(self.fraction, self._all_steps)
                    loss = self._make_step(learned)
                    self.step += 1
                    self.losses = [*self.losses, loss][-_LOSSES:]
                    self.seconds = time.perf_counter() - began
                    self.on_time &= self._of_time <= self.step / self._all_steps
                    report(self.progress())
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        return self.progress()

    def _plan(self, learned: Sequence[Tensor], began: float) -> None:
        """Find out how many steps there is time for, by making some at a learning rate of 0."""
        assert self.settings.minutes is not None
        durations = []
        for _ in range(1 + _TIMED):
            start = time.perf_counter()
            self._make_step(learned)
            durations.append(time.perf_counter() - start)
            if time.perf_counter() - began > 60 * self.settings.minutes:
                break
        self._begin()
        self.seconds = self.planned_at = time.perf_counter() - began
        left = _MARGIN * (60 * self.settings.minutes - self.seconds)
        self.steps = max(1, int(left / min(durations[1:] or durations)))

    @property
    def _all_steps(self) -> int:
        assert self.steps is not None
        return self.steps

    @property
    def _of_time(self) -> float:
        """Of the time that was left when the steps were planned, the fraction that is spent."""
        if self.settings.minutes is None:
            return 0.0
        left = 60 * self.settings.minutes - self.planned_at
        return (self.seconds - self.planned_at) / left if left > 0 else float(self.step > 0)

    @property
    def fraction(self) -> float:
        """Of the budget that is spent: the more of steps and time, 0..1."""
        return min(1.0, max(self.step / self._all_steps, self._of_time))

    def progress(self) -> Progress:
        """Return how far it has come."""
        return Progress(
            self.step,
            self.steps,
            self.seconds,
            self.fraction,
            sum(self.losses) / len(self.losses) if self.losses else math.nan,
            self.step * self.settings.batch_size / max(self.seconds, 1e-9),
            self.on_time,
        )

    def _make_step(self, learned: Sequence[Tensor]) -> float:
        device = learned[0].device
        chosen = torch.randint(len(self.images), (self.settings.batch_size,), generator=self.generator)
        images = views(self.images[chosen], self.generator).to(device)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")
        with autocast, torch.no_grad():
            wanted = self.teacher(images)
        with autocast, torch.enable_grad():
            loss = output_distance(self.student(images), wanted, classes=classifies(self.teacher))
        gradients = torch.autograd.grad(loss, learned, allow_unused=True)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"The loss of the reconstruction became NaN or infinite in step {self.step + 1}: lower the rate."
            )
        for parameter, gradient in zip(learned, gradients, strict=True):
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
        self.optimizer.step()
        return value


def _peaks(learned: Mapping[str, nn.Parameter], learning_rate: float) -> dict[str, float]:
    """Return the highest rate of each parameter: a scale's logarithm moves as it is, all else by its size.

    Sizes are rounded to powers of two, for an optimizer's groups are to be few.
    """
    peaks: dict[str, float] = {}
    for name, parameter in learned.items():
        peaks[name] = learning_rate
        if not name.endswith(".log_scale"):
            size = float(parameter.detach().cpu().double().square().mean().sqrt())
            if not math.isfinite(size):
                raise NonFiniteLossError(f"The weights of {name} hold a NaN or an infinity: check the float model.")
            peaks[name] *= _OF_SIZE * 2.0 ** round(math.log2(max(size, _SMALLEST)))
    return peaks


def _rate(fraction: float, steps: int) -> float:
    """Return the learning rate at a fraction of the budget, as a fraction of its peak; of the first step not 0."""
    risen = min(1.0, (fraction + 1 / steps) / WARMUP)
    return risen * (0.5 + 0.5 * math.cos(math.pi * fraction))


def _check_student(student: nn.Module) -> None:
    quantizers = {name: module for name, module in student.named_modules() if isinstance(module, Quantizer)}
    if not quantizers:
        raise ConfigError("This model has no quantizers to reconstruct: pass what qvit.quantize returned.")
    for name, quantizer in quantizers.items():
        if not quantizer.calibrated:
            raise UncalibratedError(f"{name} has no scale yet: call qvit.calibrate(model, batches) first.")
    check_quantized(student)
    check_values(student)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ConfigError(
            "No parameter of this model learns: call requires_grad_(True) on what is to be reconstructed."
        )
