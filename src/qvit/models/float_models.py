"""Float models to distil from or to start from, wherever they are: a file, a folder, timm, the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import timm
import timm.data
from timm.models import VisionTransformer

from qvit.errors import CheckpointError, ConfigError, HubError, QvitError, UnsupportedModelError
from qvit.files import first_line, shown
from qvit.models.checkpoint import build, is_checkpoint, parts_of, rebuilt
from qvit.models.families import family_of
from qvit.models.fetch import CHECKPOINT, PREFIX, fetch
from qvit.models.foreign import Report, adapted, count_classes
from qvit.models.reading import INDEX, WEIGHTS, find_weights, read_file, read_json
from qvit.models.spec import ModelSpec, describe, same_architecture, shape_of, unnamed_classes
from qvit.models.transformers_vit import class_names, is_transformers_config, load_transformers
from qvit.models.weights import fitting

_SETTINGS = ["config.json", "preprocessor_config.json", "processor_config.json", CHECKPOINT]
_PREPROCESSING = ("mean", "std", "crop_pct", "crop_mode", "interpolation")


def load_float(
    source: str | Path,
    expected: ModelSpec | None,
    report: Report,
    *,
    quantized: bool = False,
    model_name: str | None = None,
) -> tuple[VisionTransformer, ModelSpec]:
    """Return a float model and its spec, wherever it is, for images of the size that ``expected`` has.

    Args:
        source: ``hf-hub:OWNER/NAME`` (``@REVISION`` may follow) or a folder with the same files: a timm model, a ViT,
            DeiT, Swin, BEiT, DINOv2, CLIP or SigLIP of transformers' (:mod:`qvit.models.transformers_vit`), or a float
            checkpoint of qvit's; the name of a timm model that has pretrained weights, with or without their tag; or a
            file: a checkpoint of qvit's, or weights of ``expected``'s model that timm, DeiT, Lightning or others wrote
            (:func:`qvit.models.foreign.adapted`).
        expected: the model and the classes that the user works with; ``None`` to take what the source says, which a
            file of weights alone does not.
        report: takes a sentence about each decision that is made on the way, such as which of two sets of weights is
            taken, or that a position embedding was resampled.
        quantized: whether a file may also be a checkpoint of a quantized model.
        model_name: timm's, of a file of weights alone, where nothing is expected.

    Raises:
        HubError: if the Hub or timm cannot hand it out.
        CheckpointError: if it is absent, damaged, quantized, or of another model.
        UnsupportedModelError: if it is no vision transformer, or one that cannot be represented.
        ConfigError: for a name of weights that timm does not have.
    """
    source = str(source)
    if source.startswith(PREFIX):
        model, spec = _from_folder(_fetched(source.removeprefix(PREFIX)), source, expected, report)
    elif source and Path(source).is_dir():
        model, spec = _from_folder(Path(source), source, expected, report)
    elif is_model_name(source):
        model, spec = _from_timm(source, expected, report)
    else:
        refuse_misspelt(source)
        model, spec = _from_file(Path(source), expected, report, quantized=quantized, model_name=model_name)
    if expected is None:
        return model, spec
    _fit_images(model, spec, source, expected, report)
    if same_architecture(spec, expected):
        spec = dataclasses.replace(spec, name=expected.name, model_args=dict(expected.model_args))
    return model, spec


def is_model_name(source: str) -> bool:
    """Return whether ``source`` is timm's name of a model, with or without the tag of its weights, and no file."""
    return not Path(source).exists() and bool(timm.is_model(source))


def refuse_misspelt(source: str) -> None:
    """Refuse what is no file and nearly the name of a model, and no name at all.

    Raises:
        ConfigError: naming what may be meant.
    """
    if not source:  # an unset variable of a script; the empty path would be this folder
        raise ConfigError("The name of a model is empty: give a file, a folder, or timm's name of one.")
    near = [] if Path(source).exists() else difflib.get_close_matches(source, timm.list_models(), 3, 0.8)
    if near:
        raise ConfigError(
            f"There is no file {source} and no model of timm's of that name: did you mean {' or '.join(near)}?"
        )


def untrained_spec(source: str, image_size: int | None = None) -> ModelSpec:
    """Return the spec that timm's model ``source`` has with its pretrained weights, which are not fetched.

    Args:
        source: its name, with or without the tag of its weights.
        image_size: pixels of a side of the images; by default those that the model is made for.

    Raises:
        ConfigError: for a model or a size that cannot be.
    """
    name, _, _ = source.partition(".")
    try:
        settings: Any = timm.get_pretrained_cfg(source)
    except RuntimeError as error:  # an unknown tag
        raise ConfigError(f"timm does not know {source}: {first_line(error)}") from error
    arguments = {} if image_size is None else {"img_size": image_size}
    classes = _classes(settings.label_names, settings.num_classes, None) if settings.num_classes else []
    return describe(name, arguments, classes, {})


def _from_file(
    path: Path, expected: ModelSpec | None, report: Report, *, quantized: bool, model_name: str | None = None
) -> tuple[VisionTransformer, ModelSpec]:
    content = read_file(path)
    if not is_checkpoint(content):
        if model_name is not None:
            expected = _spec_of_weights(model_name, content, path)
        if expected is None:
            if isinstance(content, dict) and any(str(name).endswith(".codes") for name in content):
                raise CheckpointError(f"{path} is a packed model, which is quantized: a float one is needed.")
            raise CheckpointError(f"{path} holds weights and does not say of which model: name it (--model).")
        return build(expected, adapted(content, expected, str(path), report), str(path)), dataclasses.replace(expected)
    if model_name is not None:
        raise CheckpointError(f"{path} is a checkpoint of qvit's, which says itself of which model: leave out --model.")
    spec, weights, _ = parts_of(content, path)
    if spec.quant_config is not None and not quantized:
        raise CheckpointError(f"{path} holds a quantized model; a teacher must be a float one.")
    return rebuilt(spec, weights, path), spec


def _spec_of_weights(name: str, content: Any, path: Path) -> ModelSpec:
    """Return the spec of timm's model ``name`` for weights alone, with as many classes as they tell apart."""
    count = count_classes(content, shape_of(describe(name, {}, ["a", "b"], {})), str(path))
    return describe(name, {}, _classes(None, count, None) if count else [], {})


def _fetched(repository: str) -> Path:
    """Return the folder of a repository of the Hub; PyTorch's files are fetched only where there is no safetensors."""
    safe, pickled = ([name, name.replace(".", "-*-of-*."), f"{name}{INDEX}"] for name in (WEIGHTS[0], WEIGHTS[2]))
    folder = fetch(repository, [*_SETTINGS, *safe])
    if any((folder / name).exists() for name in (CHECKPOINT, *WEIGHTS)):
        return folder
    return fetch(repository, [*_SETTINGS, *pickled])


def _from_folder(
    folder: Path, source: str, expected: ModelSpec | None, report: Report
) -> tuple[VisionTransformer, ModelSpec]:
    if (folder / CHECKPOINT).exists():
        return _from_file(folder / CHECKPOINT, expected, report, quantized=False)
    if not (folder / "config.json").is_file():
        find_weights(folder, source)  # which may know better what is meant
    config = read_json(folder / "config.json", source)
    if is_transformers_config(config):
        return load_transformers(folder, source, expected, report)
    if not isinstance(config.get("architecture"), str):
        kind = shown(config.get("model_type", "unknown"))
        raise UnsupportedModelError(
            f"{source} holds a model of type {kind}: qvit reads timm's models, and of transformers' ViT, DeiT, Swin, "
            "BEiT, DINOv2, CLIP and SigLIP."
        )
    try:
        spec = _timm_spec(config, expected)
    except QvitError as error:
        raise UnsupportedModelError(f"{source} cannot be used as its config.json describes it: {error}") from error
    content = read_file(find_weights(folder, source))
    return build(spec, adapted(content, spec, source, report), source), spec


def _timm_spec(config: dict[str, Any], expected: ModelSpec | None) -> ModelSpec:
    """Return the spec that timm's ``config.json`` describes; of all that it says only what a spec has is looked at."""
    settings = config.get("pretrained_cfg")
    settings = {**settings, **config} if isinstance(settings, dict) else config
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise ConfigError(f"model_args must be names and values, not {shown(arguments)}.")
    arguments = {name: value for name, value in arguments.items() if name != "num_classes"}
    size = settings.get("input_size")
    if isinstance(size, list) and len(size) == 3:
        arguments = {"in_chans": size[0], "img_size": size[1:], **arguments}
    if settings.get("global_pool"):
        arguments = {"global_pool": settings["global_pool"], **arguments}
    count = settings.get("num_classes", 1000)
    if type(count) is not int or not 1 <= count <= 10**6:
        raise ConfigError(f"num_classes must be a whole number from 1 up, not {shown(count)}.")
    named = settings.get("label_names")
    if named and not (isinstance(named, list) and len(named) == count and all(isinstance(name, str) for name in named)):
        raise ConfigError(f"label_names must be {count} names, not {shown(named)}.")
    classes = _classes(named, count, expected)
    preprocessing = {name: settings[name] for name in _PREPROCESSING if settings.get(name)}
    return describe(config["architecture"], arguments, classes, preprocessing)


def _from_timm(source: str, expected: ModelSpec | None, report: Report) -> tuple[VisionTransformer, ModelSpec]:
    """Let timm build a model with its pretrained weights; with ``expected``'s arguments if it is called the same."""
    name, _, tag = source.partition(".")
    if not timm.is_model_pretrained(source):
        tags = [known for known in timm.list_models(f"{name}.*", pretrained=True) if known != source]
        near = difflib.get_close_matches(source, tags, 3) or tags[:3]
        hint = f"it has {', '.join(near)}." if tag and near else "give a checkpoint."
        raise ConfigError(f"timm has no pretrained weights for {source}: {hint}")
    arguments = dict(expected.model_args) if expected is not None and name == expected.name else {}
    spec = describe(name, arguments, ["a", "b"], {})
    native, made = shape_of(describe(name, {}, ["a", "b"], {})), shape_of(spec)
    try:
        model: Any = timm.create_model(source, pretrained=True, **arguments)
    except Exception as error:  # timm's download and every check of the weights in it
        raise HubError(f"timm cannot load {source} with its weights: {first_line(error)}") from error
    family_of(model)
    fitting(model.state_dict(), made if made.num_classes == model.num_classes else model, source)
    for what, old, new in (
        ("position embedding", native.patch_embed.img_size, made.patch_embed.img_size),
        ("patch embedding", native.patch_embed.patch_size, made.patch_embed.patch_size),
    ):
        if old != new:
            pixels = " to ".join(" x ".join(map(str, side)) for side in (old, new))
            report(f"{source}: the {what} was resampled from {pixels} pixels.")
    settings: Any = model.pretrained_cfg
    classes = _classes(settings.get("label_names"), int(model.num_classes), expected)
    return model.eval(), describe(name, arguments, classes, timm.data.resolve_model_data_config(model))


def _classes(named: list[str] | None, count: int, expected: ModelSpec | None) -> list[str]:
    """Return the classes of a model of timm's: its own names, ImageNet's by their number, or else those expected.

    Where nothing else is known they are called ``LABEL_0``, ``LABEL_1``, ....
    """
    subset = timm.data.infer_imagenet_subset({"num_classes": count})
    if not named and subset:
        named = timm.data.ImageNetInfo(subset).label_names()
    unnamed = {"id2label": dict(enumerate(unnamed_classes(count)))}
    return [str(name) for name in named] if named else class_names(unnamed, expected.classes if expected else [])


def _fit_images(model: VisionTransformer, spec: ModelSpec, source: str, expected: ModelSpec, report: Report) -> None:
    """Make a model take the images that are expected: the student's are what it will get."""
    (channels, *size), (needed, *wanted) = spec.preprocessing["input_size"], expected.preprocessing["input_size"]
    if channels != needed:
        raise CheckpointError(
            f"{source} takes images of {channels} channels, the images have {needed}: give a model of as many."
        )
    if size == wanted:
        return
    before, after = (" x ".join(map(str, sides)) for sides in (size, wanted))
    dynamic = getattr(model, "dynamic_img_size", False)
    if not dynamic and not isinstance(model, VisionTransformer):
        raise CheckpointError(
            f"{source} is a {type(model).__name__} for images of {before} pixels, the images have {after}: give one "
            "for images of that size."
        )
    if not dynamic:
        model.set_input_size(img_size=(wanted[0], wanted[1]))
        spec.model_args = {**spec.model_args, "img_size": wanted}
        report(f"{source}: the position embedding was resampled from images of {before} pixels to {after}.")
    spec.preprocessing = {**spec.preprocessing, "input_size": [channels, *wanted]}
