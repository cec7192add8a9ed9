from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from packed_models import make_packed, vit_program
from qvit.config import Bits
from qvit.format.packed import write_packed
from qvit.runtime.info import bytes_by_part, info_tables


def printed(path: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    for table in info_tables(path):
        console.print(table)
    return " ".join(console.file.getvalue().replace("│", " ").split())  # type: ignore[attr-defined]


def test_info_says_what_the_model_is(tmp_path: Path) -> None:
    fields = {"register_tokens": 2, "rectifier": "token", "qk_norm": ("rms", 1e-5), "mlp": "glu"}
    bits = dict(vit_program(3, **fields).bits())
    bits["blocks.1.attn.value"] = Bits(5, 5)
    model = make_packed(bits, **fields)
    write_packed(tmp_path / "m.safetensors", model)
    text = printed(tmp_path / "m.safetensors")
    assert "8 x 8, 3 channels" in text
    assert "embed 1 patches of 4 x 4 2 x 2 patches x 10" in text
    assert "tokens 1 3 prefix tokens, position embedding 3 + 2 x 2 patches x 10" in text
    assert "residual 2 attention: 2 heads of 4, rectifier: token, layer norm, eps 1e-06, rms norm, eps 1e-05" in text
    assert "MLP: glu, width 14, gelu, layer norm, eps 1e-06" in text
    assert "classify 1 head 5 logits" in text
    assert "5: class 0; class 1; class 2; class 3; class 4" in text
    assert "crop_pct: 0.9" in text
    assert "method: random" in text
    assert "blocks.*.mlp.fc1 3 3 2" in text
    assert "blocks.*.attn.query 3 2" in text
    assert "blocks.*.attn.value 3 1" in text
    assert "blocks.*.attn.value 5 1" in text


@pytest.mark.parametrize("bits", [2, 8])
def test_parts_are_the_whole_file(tmp_path: Path, bits: int) -> None:
    model = make_packed(bits)
    write_packed(tmp_path / "m.safetensors", model)
    parts = bytes_by_part(model)
    size = (tmp_path / "m.safetensors").stat().st_size
    assert parts["codes of the patch embedding"] == 10 * 48 * bits // 8
    assert parts["tokens and position embedding"] == 4 * 5 * 10
    assert sum(parts.values()) == sum(array.nbytes for array in model.tensors.values())
    text = printed(tmp_path / "m.safetensors")
    assert f"file {size:,} 100.0%" in text
    assert f"header {size - sum(parts.values()):,} " in text


def test_info_says_before_what_an_image_costs(tmp_path: Path) -> None:
    write_packed(tmp_path / "m.safetensors", make_packed(3, depth=1, channels=1))
    # Patches, qkv, both attention products over 5 tokens, projection, MLP, classifier.
    macs = 4 * 16 * 10 + 5 * 10 * 24 + 2 * 5 * 5 * 8 + 5 * 8 * 10 + 5 * 2 * 10 * 14 + 10 * 5
    assert f"3 3 {macs / 1e6:,.1f} 100.0%" in printed(tmp_path / "m.safetensors")


def test_names_that_look_like_markup_are_printed_as_they_are(tmp_path: Path) -> None:
    model = make_packed()
    model.classes[0] = "[red]cat[/]"
    write_packed(tmp_path / "m.safetensors", model)
    assert "[red]cat[/]" in printed(tmp_path / "m.safetensors")


def test_info_needs_no_torch() -> None:
    code = "import sys, qvit.runtime.info, qvit.cli.app; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not {"torch", "timm"} & loaded
