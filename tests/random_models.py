"""Random valid packed models for hypothesis: every kind of part, odd widths, bits of each quantizer for itself."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from packed_models import vit_program
from qvit.config import Bits
from qvit.format.ops import ACTIVATIONS

NORMS = st.tuples(st.sampled_from(("layer", "rms")), st.sampled_from((1e-6, 1e-3)))
MAYBE_NORM = st.none() | NORMS
BITS = st.sampled_from((2, 2, 3, 4, 4, 5, 6, 7, 8))
PAIRS = st.builds(Bits, BITS, BITS) | BITS.map(lambda bits: Bits(bits, bits))


@st.composite
def fields(draw: st.DrawFn) -> dict[str, Any]:
    """Return what a model says of itself, for :func:`packed_models.make_packed`."""
    class_token = draw(st.booleans())
    pool = draw(st.sampled_from(("token", "avg", "max", "avgmax")))
    distilled = pool == "token" and draw(st.booleans())
    registers = draw(st.sampled_from((0, 0, 1, 7, 13)))
    prefix = class_token + distilled + registers
    block = draw(st.sampled_from(("pre", "pre", "post", "parallel")))
    patch = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    grid = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)) | st.just((9, 9)))  # 81 tokens: more than one task
    odd = draw(st.tuples(st.integers(0, patch[0] - 1), st.integers(0, patch[1] - 1)))  # pixels that fill no patch
    return {
        "image_size": tuple(g * p + o for g, p, o in zip(grid, patch, odd, strict=True)),
        "patch_size": patch,
        "channels": draw(st.integers(1, 4)),
        "embed_dim": draw(st.integers(2, 70)),
        "num_heads": draw(st.integers(1, 3)),
        "head_dim": draw(st.integers(2, 40)),
        "depth": draw(st.integers(1, 2)),
        "class_token": class_token,
        "distillation_token": distilled,
        "register_tokens": registers,
        "position_embedding": draw(st.sampled_from(("all", "patches", "none"))),
        "norm": draw(MAYBE_NORM),
        "embed_norm": draw(MAYBE_NORM),
        "pre_norm": draw(MAYBE_NORM),
        "final_norm": draw(MAYBE_NORM),
        "pool_norm": draw(MAYBE_NORM),
        "query_norm": draw(MAYBE_NORM),
        "key_norm": draw(MAYBE_NORM),
        "attention_norm": draw(MAYBE_NORM),
        "mlp_norm": draw(MAYBE_NORM),
        "block": block,
        "parallel": draw(st.integers(1, 3)) if block == "parallel" else 1,
        "rectify": draw(st.sampled_from((None, "token"))),
        "mlp": draw(st.sampled_from(("plain", "glu", "glu_gate_last", "swiglu"))),
        "mlp_hidden": draw(st.integers(2, 150)),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "attention_scale": draw(st.sampled_from((0.1, 0.5))),
        "pool": pool,
        "pool_skip": 0 if pool == "token" else draw(st.sampled_from((0, prefix))),
        "class_count": draw(st.integers(1, 70)),
    }


@st.composite
def descriptions(draw: st.DrawFn) -> dict[str, Any]:
    """Return arguments of :func:`packed_models.make_packed`: all bits the same, or those of each quantizer its own."""
    given, seed = draw(fields()), draw(st.integers(0, 2**16))
    if draw(st.booleans()):
        return {"bits": draw(BITS), "seed": seed, **given}
    bits = {name: draw(PAIRS) for name in vit_program(8, **given).bits()}
    return {"bits": bits, "seed": seed, **given}
