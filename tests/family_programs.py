"""The program of one small model per family, written out: what a packed file says of Swin, BEiT, EVA, SigLIP, ...

``vit_program`` of :mod:`packed_models` is the plain vision transformer; random ones are in :mod:`programs`.
"""

from __future__ import annotations

from typing import Any

from packed_models import vit_program
from qvit.config import Bits
from qvit.format.branches import Attention, AttentionPool, Mlp, Residual, Rotary
from qvit.format.ops import OPERANDS, Classify, Embed, Layer, Merge, Norm, Operation, Pool, Tokens
from qvit.format.program import Program

EPS = 1e-6


def layer(name: str, inputs: int, outputs: int, bits: int = 4) -> Layer:
    return Layer(name, inputs, outputs, Bits(bits, bits))


def norm(name: str, kind: str = "layer") -> Norm:
    return Norm(name, kind, EPS)


def attention(name: str, width: int, heads: int, bits: int = 4, **fields: Any) -> Attention:
    """Return an attention whose heads fill the width."""
    given: dict[str, Any] = {
        "scale": (width // heads) ** -0.5,
        "norm": norm(f"{name}.norm"),
        **dict.fromkeys(OPERANDS, bits),
        **fields,
    }
    return Attention(
        name=name,
        heads=heads,
        head_dim=width // heads,
        qkv=layer(f"{name}.qkv", width, 3 * width, bits),
        proj=layer(f"{name}.proj", width, width, bits),
        **given,
    )


def mlp(name: str, width: int, hidden: int, bits: int = 4, kind: str = "plain", **fields: Any) -> Mlp:
    """Return an MLP of any kind."""
    halves = 2 if kind in ("glu", "glu_gate_last") else 1
    given: dict[str, Any] = {"activation": "gelu", "norm": norm(f"{name}.norm"), **fields}
    return Mlp(
        name=name,
        kind=kind,
        fc1=layer(f"{name}.fc1", width, halves * hidden, bits),
        fc2=layer(f"{name}.fc2", hidden, width, bits),
        gate=layer(f"{name}.gate", width, hidden, bits) if kind == "swiglu" else None,
        **given,
    )


def swin_program(
    bits: int = 4,
    *,
    image: int = 32,
    width: int = 6,
    depths: tuple[int, ...] = (2, 2),
    heads: tuple[int, ...] = (1, 2),
    window: int = 4,
    classes: int = 5,
    second: bool = False,
) -> Program:
    """Return timm's Swin: windows that are shifted in every other block, and patches merged between the stages.

    Args:
        bits: of everything but the patch embedding and the classifier, which have 8.
        image: height and width.
        width: of the first stage; each of the next has twice as much.
        depths: blocks of each stage.
        heads: of each stage.
        window: height and width; a smaller grid is one window.
        classes: of the classifier.
        second: Swin v2: norms after the branches, a logit scale per head, patches merged before their norm.
    """
    grid = image // 4
    operations: list[Operation] = [
        Embed((4, 4), layer("patch_embed.proj", 48, width, 8)),
        norm("patch_embed.norm"),
        Tokens(),
    ]
    for stage, (depth, count) in enumerate(zip(depths, heads, strict=True)):
        at = f"layers.{stage}"
        if stage:
            operations.append(Merge(layer(f"{at}.downsample.reduction", 4 * width, 2 * width, bits)))
            if second:
                operations.append(norm(f"{at}.downsample.norm"))
            else:
                operations[-1] = Merge(operations[-1].layer, norm(f"{at}.downsample.norm"))  # type: ignore[attr-defined]
            grid, width = grid // 2, 2 * width
        side = min(window, grid)
        for block in range(depth):
            distance = side // 2 if block % 2 and side < grid else 0
            fields = {"window": (side, side), "shift": (distance, distance), "bias": "relative_position"}
            scale = {"scale": None} if second else {}
            name = f"{at}.blocks.{block}"
            operations.append(Residual((attention(f"{name}.attn", width, count, bits, **fields, **scale),), second))
            operations.append(Residual((mlp(f"{name}.mlp", width, 4 * width, bits),), second))
    operations += [norm("norm"), Pool("avg"), Classify((layer("head.fc", width, classes, 8),))]
    return Program("swinv2" if second else "swin", (3, image, image), tuple(operations))


def blocks(depth: int, width: int, heads: int, attention_fields: dict[str, Any], mlp_fields: dict[str, Any]) -> Any:
    """Return the residuals of a plain stack."""
    for block in range(depth):
        name = f"blocks.{block}"
        yield Residual((attention(f"{name}.attn", width, heads, **attention_fields),))
        yield Residual((mlp(f"{name}.mlp", width, 10, **mlp_fields),))


def beit_program() -> Program:
    """Return BEiT: a bias by relative position with rows for the class token, an average of the patches."""
    return Program(
        "beit",
        (3, 12, 8),
        (
            Embed((4, 4), layer("patch_embed.proj", 48, 8, 8)),
            Tokens(1),
            *blocks(2, 8, 2, {"bias": "relative_position", "rectifier": "affine"}, {"activation": "gelu_tanh"}),
            Pool("avg", skip=1),
            norm("fc_norm"),
            Classify((layer("head", 8, 5, 8),)),
        ),
    )


def eva_program() -> Program:
    """Return EVA-02: rotated queries and keys, a gated MLP with a norm inside, register tokens."""
    return Program(
        "eva",
        (3, 12, 12),
        (
            Embed((4, 4), layer("patch_embed.proj", 48, 12, 8)),
            Tokens(3, position=True),
            *blocks(
                2,
                12,
                2,
                {"rotary": Rotary("rope", "pairs"), "inner_norm": None},
                {"kind": "swiglu", "activation": "silu", "inner_norm": None},
            ),
            Residual(
                (
                    attention(
                        "blocks.2.attn",
                        12,
                        2,
                        rotary=Rotary("blocks.2.rope", "halves", 2),
                        query_norm=norm("blocks.2.attn.q_norm"),
                        key_norm=norm("blocks.2.attn.k_norm", "rms"),
                        inner_norm=norm("blocks.2.attn.inner_norm"),
                        rectifier="token",
                    ),
                )
            ),
            Residual((mlp("blocks.2.mlp", 12, 10, kind="swiglu", inner_norm=norm("blocks.2.mlp.inner_norm", "rms")),)),
            norm("norm"),
            Pool("token"),
            Classify((layer("head", 12, 5, 8),)),
        ),
    )


def siglip_program() -> Program:
    """Return a SigLIP tower: tokens pooled by attention, one more MLP, and no classifier."""
    latent = AttentionPool(
        name="attn_pool",
        heads=2,
        head_dim=4,
        scale=0.5,
        kv=layer("attn_pool.kv", 8, 16),
        query=4,
        key=4,
        value=4,
        map=4,
        proj=layer("attn_pool.proj", 8, 8),
        key_norm=norm("attn_pool.k_norm"),
    )
    return Program(
        "siglip",
        (3, 8, 12),
        (
            Embed((4, 4), layer("patch_embed.proj", 48, 8, 8)),
            Tokens(position=True),
            *blocks(2, 8, 2, {}, {"activation": "gelu_tanh"}),
            norm("norm"),
            latent,
            Residual((mlp("attn_pool.mlp", 8, 10),)),
            Pool("token"),
        ),
    )


def feature_program() -> Program:
    """Return a plain vision transformer without a classifier (DINOv2)."""
    program = vit_program(4, register_tokens=2, mlp="glu", activation="silu")
    return Program("features", program.input, program.operations[:-1])


FAMILIES: dict[str, Program] = {
    "vit": vit_program(4, distillation_token=True, qk_norm=("layer", EPS), rectifier="token"),
    "swin": swin_program(),
    "swinv2": swin_program(second=True),
    "beit": beit_program(),
    "eva": eva_program(),
    "siglip": siglip_program(),
    "features": feature_program(),
}
"""A program per family, of which each operation, branch, field and choice of the format is in at least one."""


def shifted_program() -> Program:
    """Return a program of shifted windows, more than one task takes, whose logits differ by more than their mask."""
    attention = Attention(
        name="attn",
        heads=2,
        head_dim=6,
        qkv=Layer("qkv", 12, 36, Bits(4, 4)),
        proj=Layer("proj", 12, 12, Bits(4, 4)),
        scale=40.0,
        window=(2, 4),
        shift=(1, 2),
        **dict.fromkeys(OPERANDS, 8),
    )
    embed = Embed((1, 1), Layer("patch_embed", 1, 12, Bits(4, 4)))
    return Program("shifted", (1, 8, 16), (embed, Residual((attention,)), Pool("avg")))
