"""Random valid programs: a hypothesis strategy per operation, and one of whole programs per family.

An operation's strategy takes what flows in, a :class:`Stream`, and the name under which its tensors stand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from hypothesis import strategies as st

from packed_models import vit_program
from qvit.config import MAX_BITS, MIN_BITS, Bits
from qvit.format.branches import Attention, AttentionPool, Mlp, Residual, Rotary
from qvit.format.ops import ACTIVATIONS, OPERANDS, Classify, Embed, Layer, Merge, Norm, Operation, Pool, Stream, Tokens
from qvit.format.program import Program

HEADS, HEAD_DIMS = st.integers(1, 3), st.integers(1, 5) | st.integers(1, 40)
WIDTHS, HIDDEN = st.integers(1, 12) | st.integers(1, 70), st.integers(1, 20) | st.integers(1, 150)
"""Small, or beyond what kernels pad to: they take channels in groups of 16, 32 and 64."""
BITS = st.integers(MIN_BITS, MAX_BITS) | st.just(MIN_BITS)
PAIRS = st.builds(Bits, BITS, BITS) | BITS.map(lambda bits: Bits(bits, bits))
SCALES = st.floats(0.01, 4.0)
NORM_KINDS = st.sampled_from(("layer", "rms"))
NORMS, FIRST_NORMS = st.integers(0, 2), st.sampled_from(12 * (0,) + 12 * (1,) + (2,))
"""How many follow one another; of the patches, where the engine refuses two before tokens, seldom more than one."""
EPSILONS = st.sampled_from((1e-5, 1e-6, 1e-12, 0.1))
"""The last shows where one is left out: values have a variance of about 1."""
MLP_KINDS = ("plain", "glu", "glu_gate_last", "swiglu")
SIDES = st.sampled_from((1, 2, 3, 4, 6, 8)) | st.just(12)
"""The largest give more tokens than the 60 rows of a task, and so fill the memory that is made for them."""


@st.composite
def layers(draw: st.DrawFn, name: str, inputs: int, outputs: int) -> Layer:
    return Layer(name, inputs, outputs, draw(PAIRS))


@st.composite
def norms(draw: st.DrawFn, name: str) -> Norm:
    return Norm(name, draw(NORM_KINDS), draw(EPSILONS))


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


@st.composite
def embeds(draw: st.DrawFn, x: Stream) -> Embed:
    patch = tuple(draw(st.integers(1, side) | st.just(1)) for side in x.grid)
    width = draw(WIDTHS)
    return Embed(patch, draw(layers("patch_embed", x.width * patch[0] * patch[1], width)))


@st.composite
def tokens(draw: st.DrawFn, x: Stream) -> Tokens:
    return Tokens(draw(st.sampled_from((0, 1, 2, 3, 13))), draw(st.booleans()))


@st.composite
def attentions(draw: st.DrawFn, x: Stream, name: str, *, windows: bool | None = None) -> Attention:
    """Attentions of every kind; ``windows`` asks for windows or for none."""
    heads, head_dim = draw(HEADS), draw(HEAD_DIMS)
    if windows is None:
        windows = draw(st.booleans())
    window, shift, rotary = None, (0, 0), None
    if windows and x.prefix == 0 and x.grid != (0, 0):
        divisors = [[length for length in range(1, side + 1) if side % length == 0] for side in x.grid]
        window = tuple(draw(st.sampled_from(lengths)) for lengths in divisors)
        shift = tuple(draw(st.integers(0, length - 1)) for length in window)
    elif x.grid != (0, 0) and draw(st.booleans()):
        head_dim *= 2
        rotary = Rotary(f"{name}.rope", draw(st.sampled_from(("pairs", "halves"))), draw(st.sampled_from((1, heads))))
    return Attention(
        name=name,
        heads=heads,
        head_dim=head_dim,
        qkv=draw(layers(f"{name}.qkv", x.width, 3 * heads * head_dim)),
        proj=draw(layers(f"{name}.proj", heads * head_dim, x.width)),
        norm=draw(maybe(norms(f"{name}.norm"))),
        scale=draw(maybe(SCALES)),
        query_norm=draw(maybe(norms(f"{name}.q_norm"))),
        key_norm=draw(maybe(norms(f"{name}.k_norm"))),
        rotary=rotary,
        rectifier=draw(st.sampled_from((None, "token", "affine"))),
        window=window,
        shift=shift,
        bias="relative_position" if x.grid != (0, 0) and draw(st.booleans()) else None,
        inner_norm=draw(maybe(norms(f"{name}.inner_norm"))),
        **{operand: draw(BITS) for operand in OPERANDS},
    )


@st.composite
def mlps(draw: st.DrawFn, x: Stream, name: str) -> Mlp:
    kind, hidden = draw(st.sampled_from(MLP_KINDS)), draw(HIDDEN)
    halves = 2 if kind in ("glu", "glu_gate_last") else 1
    return Mlp(
        name=name,
        kind=kind,
        activation=draw(st.sampled_from(ACTIVATIONS)),
        fc1=draw(layers(f"{name}.fc1", x.width, halves * hidden)),
        fc2=draw(layers(f"{name}.fc2", hidden, x.width)),
        gate=draw(layers(f"{name}.gate", x.width, hidden)) if kind == "swiglu" else None,
        norm=draw(maybe(norms(f"{name}.norm"))),
        inner_norm=draw(maybe(norms(f"{name}.inner_norm"))),
    )


@st.composite
def residuals(draw: st.DrawFn, x: Stream, name: str, *, windows: bool | None = None) -> Residual:
    """One to three branches of either kind side by side, their norms before or after them; the windows are shared."""
    if windows is None:
        windows = draw(st.booleans())
    branches: list[Attention | Mlp] = []
    for index in range(draw(st.integers(1, 3))):
        branch = draw(attentions(x, f"{name}.{index}", windows=windows) | mlps(x, f"{name}.{index}"))
        first = next((other for other in branches if isinstance(other, Attention)), branch)
        if isinstance(branch, Attention):
            branch = dataclasses.replace(branch, window=first.window, shift=first.shift)
        branches.append(branch)
    return Residual(tuple(branches), draw(st.booleans()))


@st.composite
def merges(draw: st.DrawFn, x: Stream, name: str) -> Merge:
    """For a grid of even sides without prefix tokens."""
    return Merge(draw(layers(f"{name}.reduction", 4 * x.width, draw(WIDTHS))), draw(maybe(norms(f"{name}.norm"))))


@st.composite
def attention_pools(draw: st.DrawFn, x: Stream, name: str) -> AttentionPool:
    heads, head_dim = draw(HEADS), draw(HEAD_DIMS)
    return AttentionPool(
        name=name,
        heads=heads,
        head_dim=head_dim,
        scale=draw(SCALES),
        kv=draw(layers(f"{name}.kv", x.width, 2 * heads * head_dim)),
        proj=draw(layers(f"{name}.proj", heads * head_dim, draw(WIDTHS))),
        key_norm=draw(maybe(norms(f"{name}.k_norm"))),
        **{operand: draw(BITS) for operand in OPERANDS},
    )


@st.composite
def pools(draw: st.DrawFn, x: Stream) -> Pool:
    kind = draw(st.sampled_from(("token", "avg", "max", "avgmax")))
    if kind == "token":
        return Pool(kind, tokens=draw(st.integers(1, min(x.tokens, 3)) | st.integers(1, x.tokens)))
    return Pool(kind, skip=draw(st.integers(0, min(x.tokens - 1, 3))))


@st.composite
def classifiers(draw: st.DrawFn, x: Stream) -> Classify:
    classes = draw(WIDTHS)
    return Classify(tuple(draw(layers(f"head.{index}", x.width, classes)) for index in range(x.tokens)))


class _Line:
    """Operations in a row, and what flows out of the last."""

    def __init__(self, size: tuple[int, int, int]) -> None:
        self.size, self.operations = size, list[Operation]()
        self.x = Stream("image", 0, size[0], size[1:])

    def add(self, operation: Operation | None) -> None:
        if operation is not None:
            self.operations.append(operation)
            self.x = operation.after(self.x, f"program[{len(self.operations) - 1}]")

    def can_merge(self) -> bool:
        return self.x.prefix == 0 and self.x.grid != (0, 0) and not any(side % 2 for side in self.x.grid)


@st.composite
def vit_programs(draw: st.DrawFn) -> Program:
    """Plain vision transformers: equal blocks, every layer and operand with bits of its own."""
    pool = draw(st.sampled_from(("token", "avg", "max", "avgmax")))
    class_token, distilled = pool == "token" or draw(st.booleans()), pool == "token" and draw(st.booleans())
    registers = draw(st.sampled_from((0, 1, 2, 13)))
    kinds = maybe(st.tuples(NORM_KINDS, EPSILONS))
    fields: dict[str, Any] = {
        "image_size": (draw(SIDES), draw(SIDES)),
        "channels": draw(st.integers(1, 3)),
        "embed_dim": draw(WIDTHS),
        "num_heads": draw(HEADS),
        "head_dim": draw(HEAD_DIMS),
        "depth": draw(st.integers(1, 2)),
        "class_token": class_token,
        "distillation_token": distilled,
        "register_tokens": registers,
        "position_embedding": draw(st.sampled_from(("all", "none"))),
        "norm": draw(st.tuples(NORM_KINDS, EPSILONS)),
        **{name: draw(kinds) for name in ("embed_norm", "pre_norm", "final_norm", "pool_norm", "qk_norm")},
        **{name: draw(kinds) for name in ("attention_norm", "mlp_norm")},
        "block": draw(st.sampled_from(("pre", "post", "parallel"))),
        "parallel": draw(st.integers(1, 3)),
        "rectifier": draw(st.sampled_from((None, "token"))),
        "mlp": draw(st.sampled_from(MLP_KINDS)),
        "mlp_hidden": draw(HIDDEN),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "attention_scale": draw(SCALES),
        "pool": pool,
        "pool_skip": 0 if pool == "token" else draw(st.sampled_from((0, class_token + registers))),
        "class_count": draw(WIDTHS),
    }
    fields["patch_size"] = tuple(draw(st.integers(1, side)) for side in fields["image_size"])
    program = vit_program(3, **fields)
    bits = {name: draw(PAIRS) if name in program.layers() else Bits(*[draw(BITS)] * 2) for name in program.bits()}
    return vit_program(bits, **fields)


@st.composite
def window_programs(draw: st.DrawFn) -> Program:
    """As Swin: windows and MLPs of every kind, grids that are merged, any pool but the tokens'."""
    line = _start(draw, prefix=False)
    for stage in range(draw(st.integers(1, 3))):
        if line.can_merge() and (stage or draw(st.booleans())):
            line.add(draw(merges(line.x, f"layers.{stage}.merge")))
        _add_norms(draw, line, f"layers.{stage}.norm")
        for block in range(draw(st.integers(1, 2))):
            line.add(draw(residuals(line.x, f"layers.{stage}.{block}", windows=True)))
    return _end(draw, line)


@st.composite
def token_programs(draw: st.DrawFn) -> Program:
    """As BEiT and EVA-02: prefix tokens, attention over all tokens with a bias or a rotation, blocks all different."""
    line = _start(draw, prefix=True)
    for block in range(draw(st.integers(1, 3))):
        line.add(draw(residuals(line.x, f"blocks.{block}", windows=False)))
    return _end(draw, line)


@st.composite
def pooled_programs(draw: st.DrawFn) -> Program:
    """As SigLIP: tokens pooled by attention, and more residuals on the one token that is left."""
    line = _start(draw, prefix=draw(st.booleans()))
    for block in range(draw(st.integers(0, 2))):
        line.add(draw(residuals(line.x, f"blocks.{block}")))
    _add_norms(draw, line, "norm")
    line.add(draw(attention_pools(line.x, "attn_pool")))
    for block in range(draw(st.integers(0, 2))):
        line.add(draw(residuals(line.x, f"attn_pool.{block}")))
    return _end(draw, line)


FAMILIES: dict[str, st.SearchStrategy[Program]] = {
    "vit": vit_programs(),
    "windows": window_programs(),
    "tokens": token_programs(),
    "pooled": pooled_programs(),
}
"""``vit`` always classifies; the others may end as feature extractors."""


@st.composite
def programs(draw: st.DrawFn, families: Collection[str] = tuple(FAMILIES)) -> Program:
    """Random valid programs of some families."""
    return draw(FAMILIES[draw(st.sampled_from(sorted(families)))])


def _start(draw: st.DrawFn, prefix: bool) -> _Line:
    line = _Line((draw(st.integers(1, 3)), draw(SIDES), draw(SIDES)))
    line.add(draw(embeds(line.x)))
    _add_norms(draw, line, "patch_embed.norm", FIRST_NORMS)
    position = draw(st.booleans())
    line.add(draw(tokens(line.x)) if prefix else Tokens(position=position))
    _add_norms(draw, line, "norm_pre")
    return line


def _add_norms(draw: st.DrawFn, line: _Line, name: str, counts: st.SearchStrategy[int] = NORMS) -> None:
    for index in range(draw(counts)):
        line.add(draw(norms(f"{name}.{index}")))


def _end(draw: st.DrawFn, line: _Line) -> Program:
    _add_norms(draw, line, "final_norm")
    line.add(draw(pools(line.x)))
    _add_norms(draw, line, "fc_norm")
    if draw(st.booleans()):
        line.add(draw(classifiers(line.x)))
    return Program("random", line.size, tuple(line.operations))
