"""The optimizer of a model: which parameters it takes, at which rate, with which decay."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_weight_decay

from qvit.nn.quantizer import Float32Module
from qvit.train.distributed import is_sharded
from qvit.train.recipe import Hyperparameters


def make_optimizer(model: VisionTransformer, hyperparameters: Hyperparameters) -> tuple[torch.optim.Optimizer, float]:
    """Return the optimizer of a model, sharded or not, and the norm to which its gradients have to be clipped."""
    arguments, clip = dict(hyperparameters.optimizer_args), hyperparameters.clip_grad
    if is_sharded(model) and hyperparameters.optimizer == "lamb":
        # timm's LAMB clips by itself, to 1 unless told otherwise, but not where some gradients are sharded.
        limit = arguments.pop("max_grad_norm", 1.0)
        arguments["max_grad_norm"] = None
        clip = min(clip or math.inf, limit or math.inf)
    optimizer = create_optimizer_v2(
        parameter_groups(model, hyperparameters),
        opt=hyperparameters.optimizer,
        lr=hyperparameters.lr,
        weight_decay=hyperparameters.weight_decay,
        **arguments,
    )
    return optimizer, clip


def parameter_groups(model: VisionTransformer, hyperparameters: Hyperparameters) -> list[dict[str, Any]]:
    """Return the optimizer's groups: matrices with weight decay, vectors without, scales and such at ``scale_lr``."""
    quantizers = {
        f"{prefix}.{name}": parameter
        for prefix, module in model.named_modules()
        if isinstance(module, Float32Module)
        for name, parameter in module.named_parameters(recurse=False)
    }
    kept_out: set[str] = getattr(model, "no_weight_decay", set)()
    groups = param_groups_weight_decay(model, hyperparameters.weight_decay, no_weight_decay_list=kept_out)
    kept_apart = {id(parameter) for parameter in quantizers.values()}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in kept_apart]
    if quantizers:
        lr = hyperparameters.lr * hyperparameters.scale_lr
        groups.append({"params": list(quantizers.values()), "weight_decay": 0.0, "lr": lr})
    return groups
