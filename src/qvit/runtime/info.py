"""What ``qvit info`` prints of a packed file. No PyTorch here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from qvit.format.architecture import Architecture, Norm, shown
from qvit.format.packed import PackedModel, read_packed

_BLOCKS = {"pre": "norm before each branch", "post": "norm after each branch", "parallel": "parallel branches"}
_PARTS = (
    "codes of the blocks",
    "codes of the patch embedding",
    "codes of the heads",
    "scales and offsets",
    "biases",
    "norms and rectifiers",
    "tokens and position embedding",
)


def info_tables(path: str | Path) -> list[Table]:
    """Return tables of a packed file's architecture, bits, size by part, and preprocessing.

    Raises:
        PackedFileError: as :func:`qvit.format.packed.read_packed`.
    """
    model = read_packed(path)
    return [
        _table(str(path), ("", ""), [*_architecture(model.architecture), *_about(model)]),
        _table("Bits", ("layer", "weights", "inputs", "number"), _bits(model)),
        _table("Size", ("part", "bytes", "share"), _sizes(model, Path(path).stat().st_size)),
    ]


def bytes_by_part(model: PackedModel) -> dict[str, int]:
    """Return the bytes of a model's tensors by part."""
    sizes = dict.fromkeys(_PARTS, 0)
    layers = {linear.name for linear in model.architecture.linear_layers()}
    for name, array in model.tensors.items():
        owner, _, kind = name.rpartition(".")
        if kind == "codes":
            place = {"patch_embed": "patch embedding", "blocks": "blocks"}.get(name.partition(".")[0], "heads")
            part = f"codes of the {place}"
        elif kind in ("scale", "offset", "input_scale", "input_offset"):
            part = "scales and offsets"
        elif name in ("prefix_tokens", "position_embedding"):
            part = "tokens and position embedding"
        else:
            part = "biases" if owner in layers else "norms and rectifiers"
        sizes[part] += array.nbytes
    return sizes


def _architecture(net: Architecture) -> Iterator[tuple[str, str]]:
    def size(height_width: tuple[int, int]) -> str:
        return f"{height_width[0]} x {height_width[1]}"

    yield "model", net.name
    yield "image", f"{size(net.image_size)}, {net.channels} channels, patches of {size(net.patch_size)}"
    kinds = ["class token"] * net.class_token + ["distillation token"] * net.distillation_token
    if net.register_tokens:
        kinds.append(f"{net.register_tokens} registers")
    yield "tokens", f"{net.tokens}: {', '.join([*kinds, f'{net.patches} patches'])}"
    branches = f" ({net.parallel})" if net.block == "parallel" else ""
    yield "blocks", f"{net.depth}, width {net.embed_dim}, {_BLOCKS[net.block]}{branches}"
    yield "attention", f"{net.num_heads} heads of {net.head_dim}, rectifier: {net.rectify or 'none'}"
    yield "MLP", f"{net.mlp}, width {net.mlp_hidden}, {net.activation}"
    norms = {
        "blocks": net.norm,
        "patch embedding": net.embed_norm,
        "before the blocks": net.pre_norm,
        "after the blocks": net.final_norm,
        "after pooling": net.pool_norm,
        "queries and keys": net.qk_norm,
        "attention": net.attention_norm,
        "MLP": net.mlp_norm,
    }
    used: dict[Norm, list[str]] = {}
    for where, norm in norms.items():
        if norm is not None:
            used.setdefault(norm, []).append(where)
    yield "norms", "; ".join(f"{norm.kind}, eps {norm.eps:g}: {', '.join(where)}" for norm, where in used.items())
    yield "pooling", net.pool + (" of head and head_dist" if net.distillation_token else "")


def _about(model: PackedModel) -> Iterator[tuple[str, str]]:
    names = "; ".join(model.classes[:5]) + ("; ..." if len(model.classes) > 5 else "")
    yield "classes", f"{len(model.classes)}: {names}"
    for title, data in (("preprocessing", model.preprocessing), ("origin", model.origin)):
        if data:
            yield title, "\n".join(f"{name}: {_value(value)}" for name, value in data.items())


def _value(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def _bits(model: PackedModel) -> Iterator[tuple[str, str, str, str]]:
    roles = Counter((re.sub(r"\.\d+\.", ".*.", name), bits) for name, bits in model.bits.items())
    layers = {re.sub(r"\.\d+\.", ".*.", linear.name) for linear in model.architecture.linear_layers()}
    for (role, bits), number in roles.items():
        # An operand of the attention products has no weights.
        yield role, str(bits.weight) if role in layers else "", str(bits.activation), str(number)


def _sizes(model: PackedModel, total: int) -> Iterator[tuple[str, str, str]]:
    parts = bytes_by_part(model)
    parts["header"] = total - sum(parts.values())
    for part, size in (*parts.items(), ("file", total)):
        yield part, f"{size:,}", f"{size / total:.1%}"


def _table(title: str, columns: tuple[str, ...], rows: Any) -> Table:
    table = Table(title=escape(title), show_header=any(columns), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index and any(columns) else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
