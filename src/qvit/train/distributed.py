"""One model on several processes: DDP, or FSDP2 where the optimizer's state would not fit on each of them."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from qvit.models.families import family_of
from qvit.nn.quantizer import Float32Module

_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
# No broadcast of buffers at every step: the rectifiers compute their statistics over all processes. A PyTorch that
# knows the first name warns of the second one.
_NO_BROADCAST: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _ARGUMENTS else "broadcast_buffers": False
}
_meshes: list[DeviceMesh] = []  # of all that was sharded, for leave()


def spread(model: VisionTransformer, accelerator: Accelerator, *, fsdp: bool) -> nn.Module:
    """Return ``model`` as the processes train it together: itself, wrapped for DDP, or sharded in place by FSDP2.

    All processes start from the first one's weights.
    """
    if accelerator.num_processes == 1:
        return model
    with torch.no_grad():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    if fsdp:
        shard(model)
        return model
    devices = None if accelerator.device.type == "cpu" else [accelerator.device]
    return DistributedDataParallel(model, device_ids=devices, **_NO_BROADCAST)


def shard(model: VisionTransformer) -> None:
    """Shard weights, gradients and optimizer state of ``model`` over all processes, block by block (FSDP2).

    Scales, offsets, gamma and beta stay whole on every process: some have no dimension that could be cut, and
    all together they are less than a hundredth of the model. Their gradients are averaged here.
    """
    whole = {p for m in model.modules() if isinstance(m, Float32Module) for p in m.parameters(recurse=False)}
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    _meshes.append(mesh)
    for block in family_of(model).blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    for parameter in whole:
        parameter.register_post_accumulate_grad_hook(_average)


def leave() -> None:
    """Leave the processes that have come to this end together; what they trained must not be held any more.

    A thread of gloo lets go of a tensor after those who waited for it go on, and needs Python for that: where Python
    has ended before, the thread ends the program by SIGABRT. The threads end with the last reference to their group,
    which its destruction alone does not take away: models in circles of references hold it (DDP's and FSDP2's), and
    meshes, which DTensor's caches hold for ever.
    """
    gc.collect()
    while _meshes:
        getattr(_meshes.pop(), "_pg_registry", {}).clear()
    dist.destroy_process_group()


def is_sharded(model: nn.Module) -> bool:
    """Say whether FSDP2 holds the weights of ``model`` in parts."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """Return the state dict under the plain model's names, the same in every process; all of them must call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that may be sharded as a plain one; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def beside(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return ``tensor``, equal in all processes, so that it can be computed with ``weight``, which may be sharded."""
    if not isinstance(weight, DTensor):
        return tensor
    return DTensor.from_local(tensor, weight.device_mesh, [Replicate()] * weight.device_mesh.ndim)


def gradient_norm(model: nn.Module) -> float:
    """Return the norm of all gradients together; all processes must call it."""
    # PyTorch's own get_total_norm takes sharded or whole gradients, not both at once.
    norms = torch.stack([whole(torch.linalg.vector_norm(gradient.float())) for gradient in _gradients(model)])
    return float(torch.linalg.vector_norm(norms))


def scale_gradients(model: nn.Module, factor: float) -> None:
    """Multiply all gradients by ``factor``."""
    torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in _gradients(model)], factor)


def sum_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the sums of ``values`` over all processes; every process must give as many."""
    if not dist.is_initialized():
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@torch.no_grad()
def _average(parameter: Tensor) -> None:
    if parameter.grad is not None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
