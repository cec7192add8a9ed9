"""The kernels' codes by the names and in the shapes that the reference shows them in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qvit.format.branches import Attention, AttentionPool, Residual
from qvit.format.ops import OPERANDS, Classify, Layer
from qvit.format.program import Program

Codes = NDArray[np.uint8]
Key = tuple[int, int, str]
"""What the kernels call a quantizer: number of the operation and of its branch, and the part of it."""


def traced(program: Program, key: Key, codes: Codes) -> tuple[str, Codes]:
    """Return the file's name of a quantizer, and its codes in the reference's shape.

    Args:
        program: of the packed file.
        key: see :data:`Key`.
        codes: ``(B, rows, width)``: of an attention group by group, in each head by head.
    """
    index, branch, part = key
    operation, x = program.operations[index], program.streams[index]
    if isinstance(operation, Classify):
        return operation.heads[branch].name, codes[:, 0]
    owner = operation.branches[branch] if isinstance(operation, Residual) else operation
    if not isinstance(owner, (Attention, AttentionPool)):
        layer: Layer = getattr(owner, part)
        return layer.name, codes
    pools = isinstance(owner, AttentionPool)
    group = x.tokens if isinstance(owner, AttentionPool) else owner.group(x)
    groups = len(codes) * x.tokens // group
    if part in ("qkv", "kv"):
        return getattr(owner, part).name, codes.reshape(groups, group, -1)
    queries = 1 if pools and part in ("query", "map", "proj") else group
    by_head = codes.reshape(groups, owner.heads, queries, -1)
    if part in OPERANDS:
        return f"{owner.name}.{part}", by_head
    return owner.proj.name, by_head.transpose(0, 2, 1, 3).reshape(groups, queries, owner.width)
