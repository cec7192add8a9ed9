"""Upload and download with the Hub's transport replaced by a folder: what goes up comes back the same."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from torch import nn

import qvit
from commands import run
from family_programs import feature_program
from packed_models import random_packed
from qvit import QuantConfig, calibrate, hub, quantize
from qvit.errors import CheckpointError, HubError
from qvit.format.packed import write_packed
from qvit.models.checkpoint import read_checkpoint, write_checkpoint
from qvit.models.spec import describe
from qvit.train.recipe import load_recipe

ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
CONFIG = QuantConfig(3, 4, rectifier="token", overrides={"blocks.0.*": 5})


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that stands for the Hub: ``OWNER/NAME`` inside it is a repository."""
    folder = tmp_path / "hub"

    def create_repo(self: object, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        (folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        (folder / repo_id / ".private").write_text(str(private))

    def upload_folder(self: object, *, repo_id: str, folder_path: str, commit_message: str) -> str:
        shutil.copytree(folder_path, folder / repo_id, dirs_exist_ok=True)
        return f"{repo_id}: {commit_message}"

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if not (folder / repo_id).is_dir():
            raise FileNotFoundError(f"no repository {repo_id}")
        wanted = tmp_path / "cache" / repo_id
        wanted.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            if (folder / repo_id / name).exists():
                shutil.copy(folder / repo_id / name, wanted)
        return str(wanted)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path, make_model: Callable[..., nn.Module], images: torch.Tensor) -> Path:
    """A quantized checkpoint with an optimizer's state, as training leaves it."""
    student = quantize(make_model(), CONFIG)
    calibrate(student, [images])
    classes = [f"class {i}" for i in range(10)]
    spec = dataclasses.replace(
        describe("vit_tiny_patch16_224", ARGS, classes, {}),
        quant_config=CONFIG.to_dict(),
        method="q-vit",
        metrics={"val_top1": 87.5, "val_top5": 99.25, "val_images": 400},
        recipe=load_recipe("digits").to_dict(),
    )
    path = tmp_path / "best.pt"
    write_checkpoint(path, spec, student, {"optimizer": {"state": torch.zeros(10)}})
    return path


@pytest.fixture
def packed(tmp_path: Path, checkpoint: Path) -> Path:
    from qvit.exporting.packed import export_checkpoint

    path = tmp_path / "model.safetensors"
    export_checkpoint(checkpoint, path)
    return path


def front_matter(readme: str) -> dict[str, Any]:
    _, head, _ = readme.split("---", 2)
    return yaml.safe_load(head)


def test_checkpoint_comes_back_the_same(remote: Path, checkpoint: Path, images: torch.Tensor) -> None:
    commit = hub.push_to_hub(checkpoint, "me/small")
    assert commit == "me/small: Upload checkpoint.pt"
    assert (remote / "me/small/.private").read_text() == "False"
    model, spec = hub.from_pretrained("me/small")
    original, weights, _ = read_checkpoint(checkpoint)
    assert spec == original
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model(images).shape == (16, 10)
    # What only resuming needs stays at home.
    assert read_checkpoint(remote / "me/small/checkpoint.pt")[2] is None


def test_packed_file_comes_back_the_same(remote: Path, packed: Path, images: torch.Tensor) -> None:
    hub.push_to_hub(packed, "me/small", private=True)
    assert (remote / "me/small/.private").read_text() == "True"
    engine = hub.from_pretrained("me/small@main", packed=True)
    assert engine.classes[3] == "class 3"
    np.testing.assert_array_equal(engine(images.numpy()), qvit.load(packed)(images.numpy()))
    with safe_open(remote / "me/small/model.safetensors", "np") as file:
        assert "blocks.0.attn.qkv.codes" in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("kind", ["checkpoint", "packed"])
def test_model_card_tells_accuracy_bits_size_and_recipe(
    remote: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(kind)
    hub.push_to_hub(path, "me/small-vit")
    readme = (remote / "me/small-vit/README.md").read_text()
    assert front_matter(readme)["library_name"] == "qvit"
    assert front_matter(readme)["pipeline_tag"] == "image-classification"
    assert "# small-vit" in readme
    assert "| accuracy | top-1 87.50 %, top-5 99.25 % on 400 validation images |" in readme
    assert "| bits | weights 3, activations 4 |" in readme
    assert "| other bits | blocks.0.*: [5, 5] |" in readme
    assert "| method | q-vit |" in readme
    uploaded = remote / "me/small-vit" / ("checkpoint.pt" if kind == "checkpoint" else "model.safetensors")
    assert f"| size | {uploaded.stat().st_size / 1e6:.2f} MB |" in readme
    recipe = yaml.safe_load(readme.split("```yaml")[1].split("```")[0])
    assert recipe == load_recipe("digits").to_dict()
    assert 'from_pretrained("me/small-vit"' in readme


def test_model_card_of_a_feature_extractor_embeds_and_has_bits(remote: Path, tmp_path: Path) -> None:
    model = random_packed(feature_program())
    write_packed(tmp_path / "model.safetensors", dataclasses.replace(model, origin={}))
    hub.push_to_hub(tmp_path / "model.safetensors", "me/features")
    readme = (remote / "me/features/README.md").read_text()
    assert front_matter(readme)["pipeline_tag"] == "image-feature-extraction"
    assert "without a classifier, for its vectors, 4-bit weights and 4-bit activations" in readme
    assert 'print(engine.embed("image.jpg"))' in readme
    assert "| bits | weights 4, activations 4 |" in readme


def test_float_checkpoint_has_a_spec_and_is_a_teacher(
    remote: Path, tmp_path: Path, make_model: Callable[..., nn.Module], images: torch.Tensor
) -> None:
    from qvit.models.float_models import load_float

    float_model = make_model()
    spec = describe("vit_tiny_patch16_224", ARGS, [str(i) for i in range(10)], {})
    write_checkpoint(tmp_path / "float.pt", spec, float_model)
    hub.push_to_hub(tmp_path / "float.pt", "me/teacher")
    assert "in full precision" in (remote / "me/teacher/README.md").read_text()
    teacher, loaded_spec = load_float("hf-hub:me/teacher", spec, print)
    assert torch.equal(teacher(images), float_model(images))
    assert loaded_spec.classes == spec.classes


def test_quantized_checkpoint_of_the_hub_is_no_teacher(remote: Path, checkpoint: Path) -> None:
    from qvit.models.float_models import load_float

    hub.push_to_hub(checkpoint, "me/small")
    with pytest.raises(CheckpointError, match="quantized model"):
        load_float("hf-hub:me/small", read_checkpoint(checkpoint)[0], print)


def test_absent_file_and_absent_repository_are_named(remote: Path, checkpoint: Path) -> None:
    hub.push_to_hub(checkpoint, "me/small")
    with pytest.raises(CheckpointError, match=r"me/small has no model\.safetensors"):
        hub.from_pretrained("me/small", packed=True)
    with pytest.raises(HubError, match="does not hand out me/nothing: no repository"):
        hub.from_pretrained("me/nothing")


def test_refused_upload_is_one_sentence(remote: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, *args: object, **kwargs: object) -> None:
        raise PermissionError("401 Unauthorized\nand a page of more")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    done = run("push", checkpoint, "me/small")
    assert done == (2, "", "qvit: The Hub does not take me/small: 401 Unauthorized.\n")


def test_push_command_prints_the_commit(remote: Path, packed: Path) -> None:
    assert run("push", packed, "me/small", "--private") == (0, "me/small: Upload model.safetensors\n", "")
    assert (remote / "me/small/README.md").exists()


def test_not_a_checkpoint_is_refused_before_anything_is_made(remote: Path, tmp_path: Path) -> None:
    (tmp_path / "other.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"other\.pt"):
        hub.push_to_hub(tmp_path / "other.pt", "me/small")
    assert not remote.exists()


def test_packed_files_are_fetched_without_torch() -> None:
    code = "import qvit.hub, sys; print(sorted({'torch', 'timm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
