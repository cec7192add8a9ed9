"""What ``qvit info`` prints of a packed file. No PyTorch here."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from qvit.files import printable
from qvit.format.branches import Attention, Mlp, Residual
from qvit.format.fields import shown
from qvit.format.ops import Classify, Embed, Merge, Norm, Operation, Pool, Stream, Tokens
from qvit.format.packed import PackedModel, read_packed
from qvit.format.program import Program

_PARTS = (
    "codes of the blocks",
    "codes of the patch embedding",
    "codes of the heads",
    "scales and offsets",
    "biases",
    "norms and rectifiers",
    "tokens and position embedding",
)
SCALES = ("scale", "offset", "input_scale", "input_offset")
"""What the tensors are called that only the codes need."""


def info_tables(path: str | Path) -> list[Table]:
    """Return tables of a packed file's program, bits, work, size by part, and preprocessing.

    Raises:
        PackedFileError: as :func:`qvit.format.packed.read_packed`.
    """
    model = read_packed(path)
    return [
        _table(str(path), ("", ""), [*_about_program(model.program), *_about(model)]),
        _table("Program", ("operation", "number", "what", "gives"), _steps(model.program)),
        _table("Bits", ("layer", "weights", "inputs", "number"), _bits(model.program)),
        _table(
            "Multiply-adds of one image",
            ("weights or keys, values", "inputs", "millions", "share"),
            _work(model.program),
        ),
        _table("Size", ("part", "bytes", "share"), _sizes(model, Path(path).stat().st_size)),
    ]


def bytes_by_part(model: PackedModel) -> dict[str, int]:
    """Return the bytes of a model's tensors by part."""
    sizes = dict.fromkeys(_PARTS, 0)
    layers, ends = model.program.layers(), _ends(model.program)
    for name, array in model.tensors.items():
        owner, _, kind = name.rpartition(".")
        if kind == "codes":
            part = f"codes of the {ends.get(owner, 'blocks')}"
        elif kind in SCALES:
            part = "scales and offsets"
        elif name in ("prefix_tokens", "position_embedding"):
            part = "tokens and position embedding"
        else:
            part = "biases" if owner in layers else "norms and rectifiers"
        sizes[part] += array.nbytes
    return sizes


def _ends(program: Program) -> dict[str, str]:
    """Return which layers are no block's: the patch embedding and the classifiers."""
    ends: dict[str, str] = {}
    for operation in program.operations:
        where = {Embed: "patch embedding", Classify: "heads"}.get(type(operation))
        if where is not None:
            ends.update((layer.name, where) for layer in operation.layers())
    return ends


def _about_program(program: Program) -> Iterator[tuple[str, str]]:
    channels, height, width = program.input
    yield "model", printable(program.name)
    yield "image", f"{height} x {width}, {channels} channels"
    yield "gives", f"{program.output} logits" if program.classifies else f"a vector of {program.output} values"


def _steps(program: Program) -> Iterator[tuple[str, str, str, str]]:
    """Yield the operations; those that follow one another and differ in names alone make one row."""
    for (kind, what, gives), rows in itertools.groupby(_lines(program)):
        yield kind, str(len(list(rows))), what, gives


def _lines(program: Program) -> Iterator[tuple[str, str, str]]:
    pairs = [
        (op.op, _what(op, x), _gives(after)) for (op, x), after in zip(program.walk(), program.streams[1:], strict=True)
    ]
    # A block is an attention and an MLP one after the other: shown as one line per kind of block.
    index = 0
    while index < len(pairs):
        kind, what, gives = pairs[index]
        if kind == "residual" and index + 1 < len(pairs) and pairs[index + 1][0] == "residual":
            yield kind, f"{what}\n{pairs[index + 1][1]}", gives
            index += 2
        else:
            yield kind, what, gives
            index += 1


def _what(operation: Operation, x: Stream) -> str:
    if isinstance(operation, Embed):
        return f"patches of {operation.patch[0]} x {operation.patch[1]}"
    if isinstance(operation, Tokens):
        position = ", position embedding" if operation.position else ""
        return f"{operation.prefix} prefix tokens{position}"
    if isinstance(operation, Norm):
        return _norm(operation)
    if isinstance(operation, Residual):
        after = ", norm after it" if operation.post else ""
        return "\n".join(_branch(branch, x) + after for branch in operation.branches)
    if isinstance(operation, Merge):
        return "2 x 2 neighbours"
    if isinstance(operation, Pool):
        return f"{operation.kind}, {operation.skip} tokens left out" if operation.skip else operation.kind
    return ", ".join(printable(layer.name) for layer in operation.layers())


def _branch(branch: Attention | Mlp, x: Stream) -> str:
    if isinstance(branch, Mlp):
        return f"MLP: {branch.kind}, width {branch.hidden}, {branch.activation}{_norms(branch.norm, branch.inner_norm)}"
    window = "" if branch.window is None else f", windows of {branch.window[0]} x {branch.window[1]}"
    shift = f" shifted by {branch.shift[0]}, {branch.shift[1]}" if any(branch.shift) else ""
    extras = [
        branch.bias and "relative position bias",
        branch.rotary and "rotary",
        branch.rectifier and f"rectifier: {branch.rectifier}",
    ]
    more = "".join(f", {extra}" for extra in extras if extra)
    norms = _norms(branch.norm, branch.query_norm, branch.inner_norm)
    return f"attention: {branch.heads} heads of {branch.head_dim}{window}{shift}{more}{norms}"


def _norms(*norms: Norm | None) -> str:
    return "".join(f", {text}" for text in dict.fromkeys(_norm(norm) for norm in norms if norm is not None))


def _norm(norm: Norm) -> str:
    return f"{norm.kind} norm, eps {norm.eps:g}"


def _gives(x: Stream) -> str:
    if x.stage == "logits":
        return f"{x.width} logits"
    if x.stage == "vectors":
        return f"{x.tokens} x {x.width}"
    patches = f"{x.grid[0]} x {x.grid[1]} patches" if x.grid != (0, 0) else f"{x.tokens} tokens"
    return f"{x.prefix} + {patches} x {x.width}" if x.prefix else f"{patches} x {x.width}"


def _about(model: PackedModel) -> Iterator[tuple[str, str]]:
    names = "; ".join(map(printable, model.classes[:5])) + ("; ..." if len(model.classes) > 5 else "")
    yield "classes", f"{len(model.classes)}: {names}" if model.classes else "none: a feature extractor"
    for title, data in (("preprocessing", model.preprocessing), ("origin", model.origin)):
        if data:
            yield title, "\n".join(printable(f"{name}: {_value(value)}") for name, value in data.items())


def _value(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def _bits(program: Program) -> Iterator[tuple[str, str, str, str]]:
    def role(name: str) -> str:
        return printable(re.sub(r"\.\d+\.", ".*.", name))

    roles = Counter((role(name), bits) for name, bits in program.bits().items())
    layers = {role(name) for name in program.layers()}
    for (name, bits), number in roles.items():
        # An operand of the attention products has no weights.
        yield name, str(bits.weight) if name in layers else "", str(bits.activation), str(number)


def _work(program: Program) -> Iterator[tuple[str, str, str, str]]:
    """Yield the multiply-adds by the bits of both factors, so that it is known before what an image costs."""
    by_bits = program.macs()
    total = sum(by_bits.values())
    for bits, macs in by_bits.items():
        yield str(bits.weight), str(bits.activation), f"{macs / 1e6:,.1f}", f"{macs / total:.1%}"
    yield "all", "", f"{total / 1e6:,.1f}", "100.0%"


def _sizes(model: PackedModel, total: int) -> Iterator[tuple[str, str, str]]:
    parts = bytes_by_part(model)
    parts["header"] = total - sum(parts.values())
    for part, size in (*parts.items(), ("file", total)):
        yield part, f"{size:,}", f"{size / total:.1%}"


def _table(title: str, columns: tuple[str, ...], rows: Any) -> Table:
    table = Table(title=Text(printable(title)), show_header=any(columns), title_justify="left")
    for index, column in enumerate(columns):
        numbers = index > 0 and column not in ("", "what", "gives")
        table.add_column(column, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
