"""A float vision transformer in, the same model with quantized modules out: the one gate to all that follows."""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import LayerScale
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from qvit.config import EDGE_BITS, QuantConfig
from qvit.errors import ConfigError, UncalibratedError, UnsupportedModelError
from qvit.format.program import Program
from qvit.models.families import ATTENTIONS, MODELS, family_of, image_size_of, lower
from qvit.models.lowering import NORMS, refuse
from qvit.nn.attention import QuantAttention
from qvit.nn.linear import QuantConv2d, QuantLinear
from qvit.nn.quantizer import Float32Module, Quantizer, has_quantizers
from qvit.nn.rectifier import Rectifier

# Modules that own parameters and stay in floating point, as the residual stream does (docs/method.md, section 1).
_FLOAT = (*NORMS, LayerScale)
_LAYERS = (nn.Linear, nn.Conv2d)


def quantize(teacher: nn.Module, config: QuantConfig | None = None) -> Any:
    """Return a fully quantized copy of a vision transformer, of the same class; ``teacher`` is untouched.

    Every linear layer and both attention products work on codes, the patch embedding and the heads on 8 bits. The copy
    keeps timm's module names and loads the float model's state dict. Its scales are not set yet: pass it to
    :func:`qvit.calibrate` before running it. It is in training mode; its ``no_weight_decay()`` names what timm's
    optimizers must leave alone: beside timm's own list every log_scale, offset, gamma and beta. Its ``quant_config``
    says how it was quantized.

    What this accepts can be exported: the copy is lowered to the program of a packed file at once.

    Args:
        teacher: a model of a family of timm's that qvit knows (:mod:`qvit.models.families`); without a classifier it
            is a feature extractor.
        config: bits and rectification; 4 bits with ``rectifier="head"`` by default.

    Raises:
        UnsupportedModelError: naming the module that cannot be quantized and its class.
        ConfigError: naming an override that matches no layer.
    """
    config = config or QuantConfig()
    _check_float(teacher)
    family = family_of(teacher)
    check_unchanged(teacher)
    # A teacher is often frozen for distillation; its student is there to be trained.
    student: Any = copy.deepcopy(teacher).requires_grad_(True)
    for name, module in list(_replaced(student)):
        replacement: nn.Module
        if isinstance(module, nn.Linear):
            replacement = QuantLinear(module, config.bits(name, family.ENDS))
        elif isinstance(module, nn.Conv2d):
            replacement = QuantConv2d(module, config.bits(name, family.ENDS))
        else:
            replacement = family.ATTENTIONS[type(module)](module, config, name)
        # An attention comes before its own linear layers, which are then replaced inside the quantized one.
        student.set_submodule(name, replacement.to(next(module.parameters()).device))
    for module in student.modules():
        if isinstance(module, QuantAttention):
            module.tie()
    lower(student, image_size_of(student))
    _check_owners(teacher)
    check_overrides(teacher, config)
    quantizer_parameters = [
        f"{prefix}.{name}"
        for prefix, module in student.named_modules()
        if isinstance(module, Float32Module)
        for name, _ in module.named_parameters(recurse=False)
    ]
    kept = [*getattr(student, "no_weight_decay", set)(), *quantizer_parameters]
    # torch.compile's wrapper hands the question on, and calls its parameters otherwise.
    kept += [f"_orig_mod.{name}" for name in kept]
    # Of this one model, not of its class; a partial of plain data, that copies and pickles of the student take along.
    student.no_weight_decay = functools.partial(set, kept)
    student.quant_config = config
    student.register_load_state_dict_pre_hook(_drop_scales)
    return student.train()


def program_of(model: nn.Module, image_size: tuple[int, int]) -> Program:
    """Return the program of a float model or a student, which need not be calibrated, for images of ``image_size``.

    Raises:
        UnsupportedModelError: naming the module that cannot be quantized, or that was changed after it.
        ConfigError: if the model does not take images of this size.
    """
    if has_quantizers(model):
        check_unchanged(model)
    else:
        model = quantize(copy.deepcopy(model).to("meta"))
    return lower(model, image_size)[0]


def layers_with_bits(model: nn.Module) -> list[str]:
    """Return the names that a :class:`QuantConfig` is asked for when ``model``, a float one, is quantized."""
    names: list[str] = []
    for name, module in _replaced(model):
        if isinstance(module, _LAYERS):
            names.append(name)
        else:
            names += [f"{name}.{operand}_quantizer" for operand in ("query", "key", "value", "attention")]
    return names


def _replaced(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a float model that quantized ones replace, or of a student that did, and their names."""
    family = family_of(model)
    kinds, constants = {**family.ATTENTIONS}, tuple(f"{part}." for part in family.CONSTANT)
    kinds |= {quantized: quantized for quantized in kinds.values()}
    for name, module in model.named_modules():
        if type(module) in kinds:
            constants += tuple(f"{name}.{part}." for part in kinds[type(module)].CONSTANT)
            yield name, module
        elif isinstance(module, _LAYERS) and not f"{name}.".startswith(constants):
            yield name, module


def check_quantized(model: nn.Module) -> None:
    """Refuse a student, maybe inside a wrapper, of which a part was exchanged for a float one after quantization.

    Of a model that is not quantized at all nothing is said.

    Raises:
        UnsupportedModelError: naming the part.
    """
    if not has_quantizers(model):
        return
    for student in (module for module in model.modules() if type(module) in MODELS):
        for name, module in _replaced(student):
            if not isinstance(module, (QuantLinear, QuantConv2d, QuantAttention)):
                raise UnsupportedModelError(
                    f"{name} ({type(module).__name__}) is not quantized: it was put in after qvit.quantize. Give it to "
                    "the float model, by reset_classifier or the like, and quantize that."
                )


def _check_float(model: nn.Module) -> None:
    """Refuse what is no float model of a family.

    Raises:
        UnsupportedModelError: in one sentence.
    """
    if has_quantizers(model):
        raise UnsupportedModelError(
            f"Cannot quantize the model ({type(model).__name__}): it is quantized already; calibrate or train it as it "
            "is, or quantize the float model that it came from."
        )
    check_known(model, "quantize")


def check_known(model: nn.Module, verb: str) -> None:
    """Refuse what is no model of a family, and say what to do: unwrap it, take timm's, or gather it.

    Args:
        model: a float one, or a student.
        verb: what cannot be done with it.

    Raises:
        UnsupportedModelError: in one sentence.
    """
    kind, origin = type(model).__name__, type(model).__module__.partition(".")[0]
    if type(model) in MODELS:
        return
    if isinstance(model, torch.jit.ScriptModule):
        way = "it is compiled to TorchScript; give the model that it was made of"
    elif inside := next(((name, m) for name, m in model.named_modules() if name and type(m) in MODELS), None):
        way = f"a {type(inside[1]).__name__} is inside it; give model.{inside[0]}"
    elif isinstance(model, MODELS) and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        way = "its weights are sharded (FSDP); gather them with get_model_state_dict and load them into one that is not"
    elif isinstance(model, MODELS):
        way = "it may compute otherwise than the class of timm's that it extends; give one of that class"
    elif origin == "transformers":
        way = (
            "it is of transformers; save_pretrained(FOLDER) writes it, and qvit train --teacher FOLDER or "
            "qvit.models.float_models.load_float makes it timm's"
        )
    else:
        known = ", ".join(kind.__name__ for kind in MODELS)
        source = " of torchvision" if origin == "torchvision" else ""
        way = f"it is a model{source} and not timm's; timm.create_model makes those that qvit knows ({known})"
    raise UnsupportedModelError(f"Cannot {verb} the model ({kind}): {way}.")


def check_unchanged(model: nn.Module) -> None:
    """Refuse a model, a float one or a student, of which a part may compute otherwise than its class and weights say.

    Raises:
        UnsupportedModelError: naming the part.
    """
    for name, module in _replaced(model):
        _check_plain(name, module)
    _check_places(model)
    _check_forwards(model)


def check_values(model: nn.Module) -> None:
    """Refuse a model on the meta device, which has shapes alone.

    Raises:
        UnsupportedModelError: naming a parameter or buffer.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise UnsupportedModelError(
                f"{name} has no values, for the model is on the meta device: give it memory by to_empty(device=...), "
                "and values by load_state_dict."
            )


def check_finished(student: nn.Module) -> None:
    """Refuse a student of which a file would say other things than it computes, or that has no scales yet.

    Raises:
        UnsupportedModelError: naming the part that was changed after quantization, or that is switched off.
        UncalibratedError: naming the quantizer without a scale.
    """
    check_unchanged(student)
    check_quantized(student)
    check_values(student)
    for name, module in student.named_modules():
        if isinstance(module, (QuantLinear, QuantConv2d, QuantAttention)):
            _check_quantizers(name, module)
        if isinstance(module, (Quantizer, Rectifier)) and not module.enabled:
            refuse(name, module, "it is switched off, so that this part of the model is in floating point")
        if isinstance(module, Quantizer) and not module.calibrated:
            raise UncalibratedError(f"{name} has no scale yet: call qvit.calibrate(model, batches) first.")


def _check_quantizers(name: str, owner: nn.Module) -> None:
    """Refuse a quantized module of a class that qvit.quantize does not make, or with quantizers that it does not."""
    if type(owner) not in (QuantLinear, QuantConv2d, *ATTENTIONS.values()):
        refuse(name, owner, "it may compute otherwise than the class that it extends")
    for part, quantizer in owner.named_children():
        if not part.endswith("_quantizer"):
            continue
        weights, map_ = part == "weight_quantizer", part == "attention_quantizer"
        scales: Any = len(owner.weight) if weights else getattr(owner, "num_heads", 1)  # type: ignore[arg-type]
        bits = getattr(quantizer, "bits", EDGE_BITS)
        made = Quantizer(bits, (scales,), signed=not map_, offset=not (weights or map_))
        same = type(quantizer) is Quantizer and quantizer.extra_repr() == made.extra_repr()
        if not same or (quantizer.low, quantizer.high) != (made.low, made.high):
            refuse(
                f"{name}.{part}",
                quantizer,
                "it is not as qvit.quantize makes it and a file can hold it "
                f"({made.extra_repr()}, codes from {made.low} to {made.high})",
            )


def _check_plain(name: str, module: nn.Module) -> None:
    """Refuse a layer whose weight is not its own, which a quantized one's would be."""
    if isinstance(module, _LAYERS) and not isinstance(module._parameters.get("weight"), nn.Parameter):
        refuse(
            name,
            module,
            "its weight is computed from other parameters: make it plain, as "
            "torch.nn.utils.parametrize.remove_parametrizations does",
        )


def _check_places(model: nn.Module) -> None:
    """Refuse a layer or attention that stands at two places, which a packed file has once each."""
    kinds = (*_LAYERS, QuantAttention, *family_of(model).ATTENTIONS)
    places: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kinds) and (first := places.setdefault(module, name)) != name:
            refuse(name, module, f"it is the same module as {first}: give each place its own, by copy.deepcopy")


def _check_forwards(model: nn.Module) -> None:
    """Refuse modules that may compute otherwise than their class says, by a hook or a function put in its place."""
    if _global_forward_hooks or _global_forward_pre_hooks:
        refuse(
            "the model",
            model,
            "a forward hook of all modules (torch.nn.modules.module.register_module_forward_hook and its like) may "
            "change what it computes: remove that",
        )
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            refuse(
                name or "the model",
                module,
                "it has a forward hook, which may change what it computes: remove that; what qvit.quantize returns may "
                "have hooks until it is exported",
            )
        for attribute in vars(module).keys() - {"no_weight_decay"}:  # which optimizers ask, and quantize itself sets
            if inspect.isfunction(getattr(type(module), attribute, None)):
                refuse(
                    name or "the model",
                    module,
                    f"its {attribute} was exchanged for another function: delete that attribute (of Accelerate's, "
                    "unwrap_model with keep_fp32_wrapper=False does it)",
                )


def _check_owners(model: nn.Module) -> None:
    """Refuse, by name, parameters that would silently stay in floating point, and layers that are none in all but name.

    What has no place in the program, a hybrid's patch embedding among it, is refused before.
    """
    family = family_of(model)
    known = (*_LAYERS, *_FLOAT, *family.MODELS, *family.ATTENTIONS, *family.OWNERS)
    for name, module in model.named_modules():
        constant = f"{name}.".startswith(tuple(f"{part}." for part in family.CONSTANT))
        owns = next(module.parameters(recurse=False), None) is not None
        if owns and not constant and not isinstance(module, known):
            refuse(name, module, "its parameters are of a kind that qvit does not know")
        for kind in _LAYERS:
            if isinstance(module, kind) and not constant and type(module).forward is not kind.forward:
                refuse(name, module, f"it does not compute as {kind.__name__} does")


def check_overrides(model: nn.Module, config: QuantConfig) -> None:
    """Refuse a pattern in ``config.overrides`` that no layer of ``model``, a float one, is called by.

    Raises:
        ConfigError: naming the pattern and what is called nearly so.
    """
    names = layers_with_bits(model)
    for pattern in config.unmatched(names):
        groups = {f"{name[: dot.start()]}.*" for name in names for dot in re.finditer(r"\.", name)}
        near = difflib.get_close_matches(pattern, [*names, *sorted(groups)], 3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"layers are called like {names[0]!r}."
        raise ConfigError(f"The override {pattern!r} matches no layer of the model: {hint}")


def _drop_scales(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Let a float model's state dict, which has no scales at all, into a student, which then has to be calibrated.

    Scales are those of the weights that they were made for, which calibration may have balanced with their norms.
    """
    parts = module.named_modules(remove_duplicate=False)
    modules = [(f"{prefix}{path}.", part) for path, part in parts if isinstance(part, Float32Module)]
    states = {f"{path}{name}": value for path, part in modules for name, value in part.state_dict().items()}
    if states.keys() & state_dict.keys():
        return
    state_dict.update(states)
    for path, part in modules:
        if isinstance(part, Quantizer):
            state_dict[f"{path}log_scale"] = torch.full_like(part.log_scale, math.nan)
