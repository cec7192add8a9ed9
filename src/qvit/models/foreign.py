"""State dicts that other programs wrote: timm's ``train.py``, DeiT's ``main.py``, Lightning, torch.compile, DDP."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from timm.models import VisionTransformer
from torch import Tensor

from qvit.errors import CheckpointError
from qvit.files import shown
from qvit.models.reading import StandIn, names_of
from qvit.models.spec import ModelSpec, shape_of

Report = Callable[[str], None]
"""Takes a sentence about a decision that the user may want to know of."""

_AVERAGED = ("state_dict_ema", "model_ema")
_PLAIN = ("state_dict", "model", "model_state_dict")
_LEVELS = 4
_PREFIX = re.compile(r"^((module|_orig_mod|model|backbone)\.)+")
"""What DistributedDataParallel, torch.compile and a training program's own module put before every name."""
_PARTS = {
    *("cls_token", "dist_token", "reg_token", "pos_embed", "patch_embed", "norm_pre", "blocks", "norm", "fc_norm"),
    *("attn_pool", "head", "head_dist"),
}
"""What a vision transformer of timm's may be made of: an entry of these that the model lacks is not passed over."""
_OTHERS = {
    "embeddings.patch_embeddings.projection.weight": "transformers' names: give the folder with its config.json",
    "conv_proj.weight": "torchvision's names, and qvit reads timm's and transformers'",
    "patch_embed.proj.codes": "those of a packed model, which only runs: give the checkpoint that it was exported from",
}


def adapted(content: Any, spec: ModelSpec, source: str, report: Report) -> dict[str, Any]:
    """Return the weights in ``content`` by the names of the model of ``spec``, and report what was chosen.

    Averaged weights are preferred to the last ones; prefixes of wrappers are taken off; a position embedding of
    another image size is resampled, and layer scales get their names, as timm does it; what belongs to no vision
    transformer (a loss, a metric) is left out.

    Args:
        content: what :func:`qvit.models.reading.read_file` returned.
        spec: of the model that the weights are for.
        source: where they come from, for messages.
        report: see :data:`Report`.

    Raises:
        CheckpointError: if there are no weights in it, or those of another model: what was found, and the way out.
    """
    weights, said = _state_dict(content, source, report)
    model = shape_of(spec)
    named = _without_prefixes(weights, source)
    _check_model(named, model, spec, source, said)
    fit = _as_timm_reads(named, model)
    for entry, meaning in (("pos_embed", "position embedding"), ("position_bias_table", "relative position bias")):
        resampled = [name for name in fit if name.endswith(entry) and _shape(fit[name]) != _shape(named.get(name))]
        if resampled:
            sizes = " to ".join(str(_shape(weights[resampled[0]])) for weights in (named, fit))
            pixels = " x ".join(map(str, model.patch_embed.img_size))
            report(f"{source}: the {meaning} was resampled from {sizes}, for images of {pixels} pixels.")
    parts = _PARTS | {name.partition(".")[0] for name in model.state_dict()}
    extra = [name for name in fit if name.partition(".")[0] not in parts]
    if extra:
        report(f"{source}: what is no part of a vision transformer was left out: {names_of(dict.fromkeys(extra))}.")
    fit = {name: value for name, value in fit.items() if name not in extra}
    needed = model.state_dict().keys()
    for name in [*(name for name in needed if name not in fit), *(name for name in fit if name not in needed)]:
        state = "is absent" if name in needed else "is more than the model has"
        raise CheckpointError(f"{source} does not fit {spec.name}: {shown(name)} {state}; {_found(weights, said)}")
    return fit


def count_classes(content: Any, model: VisionTransformer, source: str) -> int:
    """Return how many classes the weights in a file tell apart, by the classifier that ``model`` has; 0 without one.

    Raises:
        CheckpointError: if the file holds no weights, those of several models, or what may be a classifier of another
            name.
    """
    weights = _without_prefixes(_state_dict(content, source, lambda sentence: None)[0], source)
    name = f"{_classifier(model)}.weight"
    head = weights.get(name)
    if isinstance(head, Tensor) and head.ndim == 2:
        return len(head)
    width = int(model.num_features)
    for other, value in weights.items():
        called_so = any(word in other for word in ("head", "classifier", "fc.")) and "." not in other.partition(".")[2]
        if called_so and isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == width:
            raise CheckpointError(f"{source} has {shown(other)} and no {name}: call its classifier so.")
    return 0


def _classifier(model: VisionTransformer) -> str:
    """Return the name of a model's classifier, of two the first."""
    settings: Any = model.pretrained_cfg
    name = settings["classifier"]
    return str(name if isinstance(name, str) else name[0])


def _state_dict(content: Any, source: str, report: Report) -> tuple[dict[str, Any], str]:
    """Return the state dict inside what a file holds, and the model that the file says it is of, or nothing."""
    said = ""
    whole = content
    for _ in range(_LEVELS):
        if not isinstance(content, dict):
            break
        settings = content.get("args")
        model = content.get("arch") or (settings.get("model") if isinstance(settings, StandIn) else None)
        said = model if isinstance(model, str) else said
        key = next((key for key in (*_AVERAGED, *_PLAIN) if isinstance(content.get(key), (dict, StandIn))), None)
        if key is None:
            break
        if key in _AVERAGED:
            report(f"{source}: the averaged weights are taken ({key}).")
        content = content[key]
    if isinstance(content, StandIn):
        raise CheckpointError(
            f"{source} holds a whole object of the class {shown(type(content).__name__)}, which only the program that "
            "saved it can read: save its state_dict() and give that."
        )
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        found = names_of(whole) if isinstance(whole, dict) else shown(whole)
        raise CheckpointError(
            f"{source} holds no weights: expected a state dict, by itself or as {', '.join((*_AVERAGED, *_PLAIN))}; "
            f"found {found}."
        )
    return {str(name): value for name, value in content.items()}, said


def _without_prefixes(weights: Mapping[str, Any], source: str) -> dict[str, Any]:
    named: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, value in weights.items():
        short = _PREFIX.sub("", name)
        if short in named:
            raise CheckpointError(
                f"{source} holds more than one model: {shown(origin[short])} and {shown(name)} are alike; save the "
                "state_dict() of the one that is meant."
            )
        named[short], origin[short] = value, name
    return named


def _check_model(weights: Mapping[str, Any], model: VisionTransformer, spec: ModelSpec, source: str, said: str) -> None:
    """Refuse other patches, which timm would resample, and other classes, with the way out."""
    patches, head = weights.get("patch_embed.proj.weight"), weights.get(f"{_classifier(model)}.weight")
    size = tuple(model.patch_embed.patch_size)
    if isinstance(patches, Tensor) and patches.ndim == 4 and tuple(patches.shape[2:]) != size:
        raise CheckpointError(
            f"{source} does not fit {spec.name}: its patches have {' x '.join(map(str, patches.shape[2:]))} pixels, "
            f"the model's {' x '.join(map(str, size))}{f'; it is of {shown(said)}' if said else ''}."
        )
    if isinstance(head, Tensor) and head.ndim == 2 and len(head) != model.num_classes:
        raise CheckpointError(
            f"{source} tells {len(head)} classes apart and the data has {model.num_classes}: give a model of these "
            "classes; qvit train --full-precision makes one."
        )


def _as_timm_reads(weights: dict[str, Any], model: VisionTransformer) -> dict[str, Any]:
    """Return ``weights`` as timm's own function for this class of models adapts them."""
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is None:
        return weights
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in inspect.signature(adapt).parameters else {}
    try:
        return dict(adapt(dict(weights), model, **options))
    except Exception:  # for weights of other shapes than it expects: they are then named one by one
        return weights


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _found(weights: Mapping[str, Any], said: str) -> str:
    known = next((meaning for name, meaning in _OTHERS.items() if any(n.endswith(name) for n in weights)), None)
    if known is None:
        known = f"it says that it is of {shown(said)}" if said else "name the model that they are of"
    return f"found {names_of(weights)}: {known}."
