"""Specs: what a model is beside its weights, and the model that a spec describes.

A spec may come from anyone's file: it is checked field by field, and a model is built without memory first.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import timm
import timm.data
import torch
from timm.layers import DropPath
from timm.models import VisionTransformer
from torch import nn

from qvit.config import QuantConfig
from qvit.errors import ConfigError, DataError, PackedFileError, UnsupportedModelError
from qvit.files import first_line, shown
from qvit.format.fields import is_number, is_whole
from qvit.format.header import check_preprocessing
from qvit.images import Mode
from qvit.models.arguments import MAX_SIDE, check_arguments
from qvit.models.families import family_of

MAX_WEIGHTS = 4 * 10**9
"""Weights of the largest model that is built; of timm's vision transformers the largest has 2.7e9."""
MAX_TOKENS = 2**16
"""Patches of the largest image that a model may be made for."""
MAX_NESTING = 8
"""Levels of the plain data in a spec."""
_Plain = (str, int, float, bool, type(None))
_SETTING = (str, int, float, bool, tuple, type(None))
_TRAINING = ("training", "weight_init_mode", "fix_init")


@dataclasses.dataclass
class ModelSpec:
    """What a model is, beside its weights: enough to build it again and to feed it.

    Args:
        name: timm's name of the architecture.
        model_args: arguments of ``timm.create_model`` beside the name and the number of classes, see
            :data:`qvit.models.arguments.ARGUMENTS`.
        classes: class names in the order of the logits; none of a feature extractor.
        preprocessing: input_size, mean, std, crop_pct, crop_mode, interpolation.
        quant_config: of a quantized model, :meth:`QuantConfig.to_dict`; ``None`` of a float one.
        method: how it was made, for people.
        metrics: measured on the validation images, for people.
        recipe: it was trained with, :meth:`qvit.train.recipe.Recipe.to_dict`, for people.
    """

    name: str
    model_args: dict[str, Any]
    classes: list[str]
    preprocessing: dict[str, Any]
    quant_config: dict[str, Any] | None = None
    method: str = "full-precision"
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def mode(self) -> Mode:
        """The image mode that the model takes: grey for one input channel."""
        return "L" if self.preprocessing["input_size"][0] == 1 else "RGB"

    @classmethod
    def read(cls, data: Any) -> ModelSpec:
        """Return the spec whose fields are ``data``, all of which is checked.

        Raises:
            ConfigError: naming the field that is absent, unknown or cannot be meant.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if not isinstance(data, dict):
            raise ConfigError(f"the spec must have names and values, it is {shown(data)}.")
        for name in data:
            if name not in fields:
                raise ConfigError(f"the spec has an unknown field {shown(name)}.")
        for name, field in fields.items():
            if name in data:
                check_plain(f"spec.{name}", data[name])
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ConfigError(f"spec.{name} is absent.")
        spec = cls(**data)
        for name in ("name", "method"):
            _check_type(name, getattr(spec, name), str, "a name")
        for name in ("model_args", "preprocessing", "metrics", "recipe"):
            _check_type(name, getattr(spec, name), dict, "names and values")
        _check_type("classes", spec.classes, list, "a list of names")
        if not all(isinstance(name, str) for name in spec.classes):
            raise ConfigError(f"spec.classes must be a list of names, not {shown(spec.classes)}.")
        if not all(isinstance(name, str) and is_number(value) for name, value in spec.metrics.items()):
            raise ConfigError(f"spec.metrics must be numbers by name, not {shown(spec.metrics)}.")
        _check_images(spec.preprocessing)
        check_arguments(spec.model_args)
        if spec.quant_config is not None:
            _check_type("quant_config", spec.quant_config, dict, "names and values")
            QuantConfig.from_dict(spec.quant_config)
        return spec


def create_model(spec: ModelSpec) -> VisionTransformer:
    """Return the float model of a spec with fresh weights.

    Raises:
        ConfigError: for a name or arguments that timm does not know or that qvit does not take, for a model too large
            to be meant, or one that is no vision transformer.
    """
    shape_of(spec)
    return instantiate(spec)


def shape_of(spec: ModelSpec) -> VisionTransformer:
    """Return the float model of a spec on PyTorch's ``meta`` device: every shape, and no memory.

    Raises:
        ConfigError: as :func:`create_model`.
    """
    if not isinstance(spec.name, str) or not timm.is_model(spec.name):
        near = difflib.get_close_matches(str(spec.name)[:100], timm.list_models(["vit_*", "deit*", "swin*"]), 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models('vit_*') lists them."
        raise ConfigError(f"timm has no model called {shown(spec.name)}: {hint}")
    name, dot, tag = spec.name.partition(".")
    if dot:
        raise ConfigError(
            f"{spec.name} names weights, by the tag {tag}, and not only a model: call the model {name}, and give "
            f"--teacher {spec.name} to start from these weights."
        )
    check_arguments(spec.model_args)
    with torch.device("meta"):
        model = instantiate(spec)
    patches = model.patch_embed.num_patches
    if not 1 <= patches <= MAX_TOKENS:
        raise ConfigError(
            f"{spec.name} with {shown(spec.model_args)} cuts images of {model.patch_embed.img_size} pixels into "
            f"{patches} patches: it must be from 1 to {MAX_TOKENS}."
        )
    weights = sum(parameter.numel() for parameter in model.parameters())
    if weights > MAX_WEIGHTS:
        raise ConfigError(
            f"{spec.name} with {shown(spec.model_args)} would have {weights} weights, the limit is {MAX_WEIGHTS}."
        )
    return model


def describe(
    name: str, model_args: Mapping[str, Any], classes: list[str], preprocessing: Mapping[str, Any]
) -> ModelSpec:
    """Return the spec of a new float model: timm's own preprocessing for it with ``preprocessing`` over it.

    Raises:
        ConfigError: as :func:`create_model`.
    """
    spec = ModelSpec(name, dict(model_args), classes, {})
    model = shape_of(spec)
    data = {**timm.data.resolve_model_data_config(model), **preprocessing}
    spec.preprocessing = {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}
    channels, size = model.in_chans, model.patch_embed.img_size
    spec.preprocessing["input_size"] = [channels, *(size or spec.preprocessing["input_size"][1:])]
    for statistic in ("mean", "std"):
        values = spec.preprocessing[statistic]
        if isinstance(values, list) and len(values) != channels:
            raise ConfigError(
                f"{name} takes {channels} channels and preprocessing.{statistic} has {len(values)}: give one value per "
                "channel."
            )
    _check_images(spec.preprocessing)
    return spec


def unnamed_classes(count: int) -> list[str]:
    """Return what classes are called of which nothing but their number is known, as transformers calls them."""
    return [f"LABEL_{number}" for number in range(count)]


def check_class_name(name: str) -> None:
    """Refuse a class whose name no packed file can hold.

    Raises:
        DataError: naming it.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"The class {name!r} has a name that is not UTF-8: rename it.") from None


def same_architecture(first: ModelSpec, second: ModelSpec) -> bool:
    """Return whether two specs are of the same computation, however their names and arguments say it.

    Raises:
        ConfigError: as :func:`create_model`.
    """
    first_call, second_call = ((spec.name, spec.model_args, len(spec.classes)) for spec in (first, second))
    return first_call == second_call or _computation(shape_of(first)) == _computation(shape_of(second))


def _computation(model: VisionTransformer) -> tuple[object, ...]:
    """Return what a model computes in evaluation, to be compared."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    layers = [
        (name, type(module), {k: v for k, v in vars(module).items() if type(v) in _SETTING and k not in _TRAINING})
        for name, module in model.named_modules()
        if not isinstance(module, (nn.Identity, nn.Dropout, DropPath))
    ]
    return shapes, layers


def instantiate(spec: ModelSpec) -> VisionTransformer:
    """Return the float model of a spec that :func:`shape_of` accepts, with fresh weights.

    Raises:
        ConfigError: if timm cannot build it, or it is no vision transformer.
    """
    try:
        model: Any = timm.create_model(spec.name, num_classes=len(spec.classes), **spec.model_args)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        raise ConfigError(
            f"timm cannot build {spec.name} with {shown(spec.model_args)}: {first_line(error)}"
        ) from error
    try:
        family_of(model)
    except UnsupportedModelError as error:
        raise ConfigError(f"{spec.name} is no model for qvit. {error}") from error
    return model


def _check_type(name: str, value: Any, kind: type, meaning: str) -> None:
    if not isinstance(value, kind):
        raise ConfigError(f"spec.{name} must be {meaning}, not {shown(value)}.")


def _check_images(preprocessing: dict[str, Any]) -> None:
    size = preprocessing.get("input_size")
    if not isinstance(size, list) or len(size) != 3 or not all(is_whole(side, 1, MAX_SIDE) for side in size):
        raise ConfigError(f"preprocessing.input_size must be channels, height and width, not {shown(size)}.")
    try:
        check_preprocessing(preprocessing, (size[0], size[1], size[2]))
    except PackedFileError as error:
        raise ConfigError(str(error)) from error


def check_plain(place: str, value: Any, level: int = 0) -> None:
    """Refuse all but numbers, texts, truth values, and lists and dictionaries of them.

    Args:
        place: what ``value`` is called, for messages.
        value: from a file.
        level: of nesting.

    Raises:
        ConfigError: naming the place.
    """
    if level > MAX_NESTING:
        raise ConfigError(f"{place} is nested too deeply.")
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ConfigError(f"{place} has a name that is no text.")
        inside = value.values()
    elif isinstance(value, (list, tuple)):
        inside = value  # type: ignore[assignment]
    elif isinstance(value, _Plain):
        return
    else:
        raise ConfigError(f"{place} must be plain data, and holds {shown(value)}.")
    for entry in inside:
        check_plain(place, entry, level + 1)
