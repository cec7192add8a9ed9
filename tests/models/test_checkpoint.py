import dataclasses
import errno
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from qvit.config import QuantConfig
from qvit.errors import CheckpointError, ConfigError, OutputError
from qvit.files import write_atomically
from qvit.models.checkpoint import load_checkpoint, read_checkpoint, write_checkpoint
from qvit.models.float_models import load_float
from qvit.models.spec import create_model, describe
from qvit.quantization.calibrate import calibrate
from qvit.quantization.convert import quantize
from qvit.train.methods import FloatModel

ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(8, 3, 16, 16)


def test_quantized_checkpoint_gives_the_same_logits(tmp_path: Path, images: torch.Tensor) -> None:
    config = QuantConfig(3, 4, rectifier="head", overrides={"blocks.0.*": 5})
    spec = describe("vit_tiny_patch16_224", ARGS, ["a", "b", "c"], {})
    student = quantize(create_model(spec), config)
    calibrate(student, [images])
    path = tmp_path / "q.pt"
    write_checkpoint(path, dataclasses.replace(spec, quant_config=config.to_dict()), student)
    loaded, loaded_spec = load_checkpoint(path)
    assert loaded_spec.classes == ["a", "b", "c"]
    assert torch.equal(loaded(images), student.eval()(images))


def test_uncalibrated_checkpoint_is_refused(tmp_path: Path) -> None:
    spec = describe("vit_tiny_patch16_224", ARGS, ["a", "b"], {})
    student = quantize(create_model(spec), QuantConfig())
    write_checkpoint(tmp_path / "q.pt", dataclasses.replace(spec, quant_config=QuantConfig().to_dict()), student)
    with pytest.raises(CheckpointError, match="input_quantizer.log_scale is no usable scale"):
        load_checkpoint(tmp_path / "q.pt")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_plain_timm_weights_are_a_float_model(tmp_path: Path, images: torch.Tensor, suffix: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **ARGS).eval()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": model.state_dict()}, path)
    else:
        safetensors.torch.save_file(model.state_dict(), path)
    loaded, _ = load_float(path, describe("vit_tiny_patch16_224", ARGS, ["a", "b"], {}), print)
    assert torch.equal(loaded(images), model(images))


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **ARGS)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="tells 3 classes apart and the data has 2"):
        load_float(tmp_path / "weights.pth", describe("vit_tiny_patch16_224", ARGS, ["a", "b"], {}), print)


def test_quantized_model_is_no_teacher(tmp_path: Path, images: torch.Tensor) -> None:
    spec = describe("vit_tiny_patch16_224", ARGS, ["a", "b"], {})
    student = quantize(create_model(spec), QuantConfig())
    calibrate(student, [images])
    spec.quant_config = QuantConfig().to_dict()
    write_checkpoint(tmp_path / "q.pt", spec, student)
    with pytest.raises(CheckpointError, match="quantized model"):
        load_float(tmp_path / "q.pt", spec, print)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_truncated_checkpoint_is_an_error_that_names_it(tmp_path: Path, teacher_file: Path, fraction: float) -> None:
    data = teacher_file.read_bytes()
    cut = tmp_path / "cut.pt"
    cut.write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(CheckpointError, match="cut.pt"):
        load_checkpoint(cut)


def test_checkpoint_with_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "ran"),)

    torch.save({"format": "qvit-checkpoint", "evil": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="evil.pt"):
        read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_newer_version_says_so(tmp_path: Path) -> None:
    torch.save({"format": "qvit-checkpoint", "version": 99}, tmp_path / "new.pt")
    with pytest.raises(CheckpointError, match="version 99.*update qvit"):
        read_checkpoint(tmp_path / "new.pt")


def test_foreign_file_says_so(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_checkpoint(tmp_path / "other.pt")


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_text("old")

    def full_disk(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        write_atomically(path, full_disk)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_is_one_sentence_and_keeps_the_old_file(teacher: FloatModel) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OutputError, match="Cannot write"):
        write_atomically(Path("/dev/shm/qvit-test"), lambda temporary: torch.save(teacher.spec.metrics, full))


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="deit_tiny_patch16_224"):
        describe("deit_tinny_patch16_224", {}, ["a", "b"], {})


def test_wrong_model_argument_is_explained() -> None:
    with pytest.raises(ConfigError, match="dephth"):
        describe("vit_tiny_patch16_224", {"dephth": 3}, ["a", "b"], {})


def test_spec_of_grey_images_needs_grey_statistics() -> None:
    with pytest.raises(ConfigError, match="preprocessing.mean has 3"):
        describe("vit_tiny_patch16_224", {**ARGS, "in_chans": 1}, ["a", "b"], {})
