"""Recipes: how a model is trained, read from YAML files."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import timm.data
import timm.optim
import torch
import yaml
from PIL import Image

from qvit.config import check_count, check_number
from qvit.data.posterize import allow_no_bits
from qvit.data.randomness import seeded
from qvit.errors import ConfigError
from qvit.files import first_line
from qvit.nn.rectifier import RectifierInit
from qvit.quantization.calibrate import WeightInit
from qvit.quantization.distill import GUIDED_WEIGHT

_NO_AUGMENTATION = {
    "input_size", "is_training", "mean", "std", "crop_pct", "crop_mode", "crop_border_pixels", "tf_preprocessing",
    "use_prefetcher", "normalize", "separate", "re_num_splits", "naflex", "patch_size", "max_seq_len", "patchify",
}  # fmt: skip
"""Arguments of timm's transforms that are the model's, or that training images do not have."""
_TRIES = 4
Section = Literal["full_precision", "quantized"]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes ``2e-3`` for a text, and the second of two entries of one name; people do not expect it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping.

        Raises:
            yaml.constructor.ConstructorError: if it has two entries of one name.
        """
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, number in names.items():
            if number > 1:
                raise yaml.constructor.ConstructorError(None, None, f"there are two entries {name!r}", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


RECONSTRUCTION = ("reconstruction_images", "reconstruction_steps")
"""Entries of a :class:`Hyperparameters` that a training depends on only if it starts from a reconstruction."""
Distillation = Literal["hard", "soft"]


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Budget, optimizer, loss and initialization of one training.

    Args:
        epochs: passes over the training images.
        batch_size: images per optimizer step, over all processes and accumulated parts.
        lr: learning rate at the start of the cosine decay to 0, after ``warmup_epochs`` of linear warm-up.
        optimizer: a name that :func:`timm.optim.create_optimizer_v2` knows.
        optimizer_args: further arguments of that optimizer (``eps``, ``betas``).
        weight_decay: of matrices alone; never of biases, norms, tokens, scales, offsets, gamma and beta.
        warmup_epochs: may be a fraction.
        label_smoothing: of the plain cross-entropy; distillation does not use it.
        augmentation: entries of the recipe's augmentation that are others in this training.
        repeated_augmentation: copies of an image per batch (Hoffer et al., 2020); 0 for none.
        scale_lr: learning rate of scales, offsets, gamma and beta, as a multiple of ``lr``.
        distillation: from a teacher, ``"hard"`` (labels and the classes that it chooses) or ``"soft"`` (its
            probabilities alone); see :class:`qvit.DistillationLoss`.
        guided_weight: lambda of :class:`qvit.DistillationLoss`.
        guided_decay: whether lambda falls to 0 along a cosine, as the learning rate does.
        guided_layers: attention layers that are guided, counted from 0, or from the end from -1; ``None`` for all.
        weight_init: initial scales of the weights, ``"minimum_error"`` or ``"lsq"`` (:func:`qvit.calibrate`).
        rectifier_init: initial gamma and beta, ``"teacher"`` or ``"unit"`` (:func:`qvit.calibrate`).
        calibration_images: training images that set the quantizers' initial scales and offsets.
        reconstruct_first: whether training starts from a reconstruction, and not from calibration alone.
        reconstruction_images: training images that a reconstruction learns the float model's outputs on.
        reconstruction_steps: of a reconstruction (:func:`qvit.reconstruct`).
        clip_grad: largest norm of all gradients together; 0 for none (LAMB clips to 1 by itself: ``max_grad_norm``).
        ema_decay: weight of the old values in the running average of the weights, which is then what is evaluated and
            what ``best.pt`` and ``last.pt`` hold; 0 for none.
        track_oscillation: whether ``metrics.jsonl`` has the percentage of weights that change code back and forth
            (:class:`qvit.train.oscillation.Oscillation`); it takes some passes over all weights at every step, and six
            bytes per weight in memory and in ``last.pt``.
        freeze_oscillating: weights that change code back and forth more often than this are frozen, and tracked for
            that (Nagel et al. use 0.01 to 0.04); 0 for none.
    """

    epochs: int
    batch_size: int
    lr: float
    optimizer: str = "lamb"
    optimizer_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weight_decay: float = 0.0
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    augmentation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    repeated_augmentation: int = 0
    scale_lr: float = 1.0
    distillation: Distillation = "hard"
    guided_weight: float = GUIDED_WEIGHT
    guided_decay: bool = False
    guided_layers: Sequence[int] | None = None
    weight_init: WeightInit = "minimum_error"
    rectifier_init: RectifierInit = "teacher"
    calibration_images: int = 512
    reconstruct_first: bool = False
    reconstruction_images: int = 1024
    reconstruction_steps: int = 500
    clip_grad: float = 0.0
    ema_decay: float = 0.0
    track_oscillation: bool = False
    freeze_oscillating: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "calibration_images", *RECONSTRUCTION):
            check_count(name, getattr(self, name))
        numbers = [field.name for field in dataclasses.fields(self) if field.type == "float"]
        for name in numbers:
            check_number(name, getattr(self, name), above_zero=False)
        check_count("repeated_augmentation", self.repeated_augmentation, 0)
        self._check_optimizer()
        for name in ("guided_decay", "reconstruct_first", "track_oscillation"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {getattr(self, name)!r}.")
        layers = self.guided_layers
        if layers is not None and not (isinstance(layers, list) and layers and all(type(n) is int for n in layers)):
            raise ConfigError(f"guided_layers must be a list of layers such as [0, -1], or null, not {layers!r}.")
        choices = {
            "distillation": get_args(Distillation),
            "weight_init": get_args(WeightInit),
            "rectifier_init": ("teacher", "unit"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be {' or '.join(known)}, not {getattr(self, name)!r}.")
        for name in ("ema_decay", "freeze_oscillating"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"{name} must be below 1, not {getattr(self, name)!r}.")

    def _check_optimizer(self) -> None:
        name = str(self.optimizer).lower().removeprefix("lookahead_")
        known = [str(known) for known in timm.optim.list_optimizers()]
        if name not in known:
            near = " or ".join(difflib.get_close_matches(name, known, 3))
            raise ConfigError(
                f"timm has no optimizer {self.optimizer!r}" + (f": did you mean {near}?" if near else ".")
            )
        parameters = inspect.signature(timm.optim.get_optimizer_class(name, bind_defaults=False)).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            _check_keys("optimizer_args", self.optimizer_args, set(parameters) - {"params", "lr", "weight_decay"})
        try:
            weights = [torch.nn.Parameter(torch.zeros(2, 2))]
            timm.optim.create_optimizer_v2(weights, opt=self.optimizer, lr=self.lr, **self.optimizer_args)
        except Exception as error:  # whatever an optimizer raises of a value that it cannot use
            given = ", ".join(f"{name} {str(value)[:60]!r}" for name, value in self.optimizer_args.items())
            raise ConfigError(
                f"{self.optimizer} does not take {given or 'these settings'}: {first_line(error)}"
            ) from error


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model's arguments, the images' preparation, and the hyperparameters of one or both kinds of training.

    Args:
        full_precision: hyperparameters of a float teacher.
        quantized: hyperparameters of quantization-aware training.
        model_args: arguments of ``timm.create_model`` beside the name (``img_size``, ``patch_size``, ``depth``, ...).
        preprocessing: mean, std, crop_pct, interpolation, where they differ from the timm model's own.
        augmentation: arguments of ``timm.data.create_transform`` for training images.
    """

    full_precision: Hyperparameters | None = None
    quantized: Hyperparameters | None = None
    model_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    augmentation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        known = set(inspect.signature(timm.data.create_transform).parameters) - _NO_AUGMENTATION
        _check_keys("augmentation", self.augmentation, known)
        _check_mapping("model_args", self.model_args)
        _check_keys("preprocessing", self.preprocessing, {"mean", "std", "crop_pct", "crop_mode", "interpolation"})
        for name in ("mean", "std"):
            value = self.preprocessing.get(name, [])
            if not isinstance(value, list):
                raise ConfigError(f"preprocessing.{name} must be a list of numbers, one per channel, not {value!r}.")
        sections = {name: getattr(self, name) for name in get_args(Section) if getattr(self, name) is not None}
        for name, hyperparameters in sections.items():
            _check_keys(f"{name}.augmentation", hyperparameters.augmentation, known)
        changed = [hyperparameters.augmentation for hyperparameters in sections.values()]
        single = [{name: value} for entries in (self.augmentation, *changed) for name, value in entries.items()]
        for augmentation in (*single, *({**self.augmentation, **changes} for changes in ({}, *changed))):
            _try_augmentation(augmentation)

    def hyperparameters(self, section: Section) -> Hyperparameters:
        """Return the hyperparameters of one kind of training.

        Raises:
            ConfigError: if the recipe has none.
        """
        hyperparameters = self.full_precision if section == "full_precision" else self.quantized
        if hyperparameters is None:
            raise ConfigError(
                f"The recipe has no {section}, which this run uses: add it with epochs, batch_size and lr."
            )
        return hyperparameters

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, to be kept beside a result."""
        return dataclasses.asdict(self)


def builtin_recipes() -> list[str]:
    """Return the names of the recipes that come with qvit."""
    folder = resources.files("qvit") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(source: str, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: the name of a built-in recipe or the path of a YAML file.
        changes: ``"quantized.epochs=5"``: dotted names and YAML values that replace or add entries.

    Raises:
        ConfigError: naming the file or entry and what is wrong with it.
    """
    if source in builtin_recipes():
        text = (resources.files("qvit") / "recipes" / f"{source}.yaml").read_text()
    else:
        try:
            text = Path(source).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"There is no recipe {source!r}: give a YAML file or one of {', '.join(builtin_recipes())}."
            ) from error
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"Recipe {source} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"Recipe {source} must be a mapping with full_precision or quantized or both.")
    for change in changes:
        _apply(data, change)
    _check_keys(f"recipe {source}", data, {field.name for field in dataclasses.fields(Recipe)})
    try:
        for name in get_args(Section):
            if name in data:
                data[name] = _hyperparameters(name, data[name])
        return Recipe(**data)
    except ConfigError as error:
        raise ConfigError(f"Recipe {source}: {error}") from error


def _hyperparameters(name: str, data: Any) -> Hyperparameters:
    if not isinstance(data, dict):
        raise ConfigError(f"{name} must be a mapping with epochs, batch_size and lr, not {data!r}.")
    _check_keys(name, data, {field.name for field in dataclasses.fields(Hyperparameters)})
    absent = {"epochs", "batch_size", "lr"} - set(data)
    if absent:
        raise ConfigError(f"{name} lacks {sorted(absent)[0]}.")
    return Hyperparameters(**data)


def _try_augmentation(augmentation: Mapping[str, Any]) -> None:
    """Augment some images.

    Raises:
        ConfigError: saying that timm does not take these arguments, and why.
    """
    image = Image.new("RGB", (24, 20))
    try:
        transform = timm.data.create_transform(16, is_training=True, **augmentation)
        for seed in range(_TRIES):
            with seeded(seed):
                allow_no_bits(transform)(image)
    except Exception as error:  # whatever timm, torchvision and Pillow raise of a value that they cannot use
        given = ", ".join(f"{name} {str(value)[:60]!r}" for name, value in augmentation.items())
        raise ConfigError(
            f"timm cannot augment images with {given}: {type(error).__name__}, {first_line(error)}"
        ) from error


def _apply(data: dict[str, Any], change: str) -> None:
    path, equals, value = change.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set takes NAME=VALUE such as quantized.epochs=5, not {change!r}.")
    node = data
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {change}: {key} is a single value, not a group of them.")
    node[keys[-1]] = yaml.load(value, _Loader)


def _check_mapping(where: str, data: Any) -> None:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be a mapping, not {data!r}.")


def _check_keys(where: str, data: Any, known: set[str]) -> None:
    _check_mapping(where, data)
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}."
            raise ConfigError(f"Unknown entry {key!r} in {where}: {hint}")
