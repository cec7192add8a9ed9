import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from qvit.data.loader import make_transform
from qvit.data.order import EvaluationOrder, Rank, Sample, TrainOrder
from qvit.data.resident import ResidentImages, ResidentLoader, crop_and_flip, decode_once, uniform
from qvit.data.sources import ImageSets, open_data
from qvit.errors import ConfigError, CorruptImageError
from qvit.train.methods import FloatModel, train_quantized
from qvit.train.options import Options
from qvit.train.recipe import Recipe

PREPROCESSING: dict[str, Any] = {"input_size": (3, 8, 8), "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.2, 0.1)}
PREPROCESSING |= {"crop_pct": 0.875, "crop_mode": "center", "interpolation": "bilinear"}
WHOLE: dict[str, Any] = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}


def samples(count: int) -> list[Sample]:
    return [Sample(number, 7919 * number + 1) for number in range(count)]


@pytest.fixture
def pictures() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (500, 3, 8, 8), generator=generator, dtype=torch.uint8)


def test_evaluation_sees_what_the_decoding_loader_would_give(image_folder: Callable[..., Path]) -> None:
    sets = open_data(str(image_folder()))
    decoded = decode_once(sets, PREPROCESSING, Console(quiet=True)).val
    assert isinstance(decoded, ResidentImages)
    loader = ResidentLoader(decoded, EvaluationOrder(8, 5), PREPROCESSING, None, torch.device("cpu"))
    images = torch.cat([batch.images for batch in loader])
    transform = make_transform(PREPROCESSING)
    expected = [sets.val[n] for n in range(8)]
    torch.testing.assert_close(images, torch.stack([transform(image) for image, _ in expected]), atol=1e-5, rtol=0)
    assert torch.cat([batch.labels for batch in loader]).tolist() == [label for _, label in expected]


def test_the_whole_image_is_left_as_it_is_and_flips_are_exact(pictures: Tensor) -> None:
    images = pictures.float()
    for interpolation in ("bilinear", "bicubic"):
        same = crop_and_flip(images, samples(500), **WHOLE, interpolation=interpolation)
        torch.testing.assert_close(same, images, atol=1e-3, rtol=0)
    mirrored = crop_and_flip(images, samples(500), **{**WHOLE, "hflip": 1.0})
    torch.testing.assert_close(mirrored, images.flip(-1), atol=1e-3, rtol=0)
    upside_down = crop_and_flip(images, samples(500), **WHOLE, vflip=1.0)
    torch.testing.assert_close(upside_down, images.flip(-2), atol=1e-3, rtol=0)


def test_half_the_images_are_flipped(pictures: Tensor) -> None:
    images = pictures.float()
    flipped = crop_and_flip(images, samples(500), **{**WHOLE, "hflip": 0.5})
    fraction = (flipped - images).abs().amax(dim=(1, 2, 3)).gt(1).float().mean()
    assert fraction == pytest.approx(0.5, abs=0.08)


def test_crops_are_boxes_of_the_asked_area_and_shape_anywhere_in_the_image() -> None:
    size, scale, ratio = 64, (0.3, 0.6), (0.5, 2.0)
    # An image that says where each of its pixels is: the crop's edges can be read off the result.
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    where = torch.stack([x, y]).float().expand(400, 2, size, size)
    crops = crop_and_flip(where, samples(400), scale=scale, ratio=ratio, hflip=0.0)
    # Neighbouring output pixels are width / size input pixels apart, in the middle where no border is near.
    middle = slice(size // 4, 3 * size // 4)
    steps = crops[:, :, middle, middle].diff(dim=-1)[:, 0].mean(dim=(1, 2)), crops[:, :, middle, middle].diff(dim=-2)
    width, height = size * steps[0], size * steps[1][:, 1].mean(dim=(1, 2))
    area, shape = width * height / size**2, width / height
    assert scale[0] - 0.02 <= area.min() < 0.33
    assert 0.57 < area.max() <= scale[1] + 0.02
    assert ratio[0] - 0.05 <= shape.min() < 0.6
    assert 1.7 < shape.max() <= ratio[1] + 0.1
    left = crops[:, 0, 0, 0] - (width / size - 1) / 2
    assert left.min() >= -0.51
    assert (left + width).max() <= size + 0.51
    assert left.round().unique().numel() > 10


def test_a_crop_is_what_pillow_makes_of_it() -> None:
    rng = np.random.default_rng(0)
    # Smooth, so that what lies beyond the crop's edge matters little.
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float()
    where = torch.stack(torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij"))[None].float()
    chosen = samples(1)
    arguments: dict[str, Any] = {"scale": (0.3, 0.3), "ratio": (1.0, 1.0), "hflip": 0.0}
    positions = crop_and_flip(where, chosen, **arguments)[0]
    side = round((0.3 * 64 * 64) ** 0.5)
    top, left = (round(float(positions[axis, 32, 32]) - side * 32.5 / 64 + 0.5) for axis in (0, 1))
    expected = image.resize((64, 64), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    crop = crop_and_flip(pixels, chosen, **arguments)[0].permute(1, 2, 0).numpy()
    assert np.abs(crop - np.asarray(expected, np.float32))[2:-2, 2:-2].max() < 1.5


def test_where_no_crop_fits_the_whole_image_is_taken(pictures: Tensor) -> None:
    images = pictures.float()
    whole = crop_and_flip(images, samples(500), scale=(1.0, 1.0), ratio=(3.0, 3.1), hflip=0.0)
    torch.testing.assert_close(whole, images, atol=1e-3, rtol=0)


def test_an_image_is_augmented_alike_whoever_sees_it(pictures: Tensor) -> None:
    resident = ResidentImages(pictures, torch.arange(500))

    def seen(rank: Rank, accumulate: int) -> dict[int, Tensor]:
        order = TrainOrder(500, 20, 3, accumulate=accumulate, rank=rank)
        loader = ResidentLoader(resident, order, PREPROCESSING, {"color_jitter": None, "interpolation": "bilinear"},
                                torch.device("cpu"))  # fmt: skip
        order.begin(2)
        return {int(label): image for batch in loader for image, label in zip(batch.images, batch.labels, strict=True)}

    alone = seen(Rank(0, 1), 1)
    two = seen(Rank(0, 2), 2) | seen(Rank(1, 2), 2)
    assert alone.keys() == two.keys()
    assert all(torch.equal(alone[label], two[label]) for label in alone)


def test_numbers_are_uniform_and_independent_of_neighbouring_seeds() -> None:
    drawn = uniform(np.arange(4000, dtype=np.uint64), 24)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.histogram(drawn, 10, (0, 1))[0] / drawn.size
    assert np.abs(counts - 0.1).max() < 0.005
    correlation = np.corrcoef(drawn.T)
    assert np.abs(correlation - np.eye(24)).max() < 0.08
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.02
    assert np.unique(drawn).size == drawn.size


def test_mixing_is_splitmix64() -> None:
    # Reference outputs of Vigna's splitmix64.c for the state 1234567, whose n-th output mixes state + n * golden.
    from qvit.data.resident import _mix

    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        states = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * golden
    assert _mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize(
    ("augmentation", "complaint"),
    [
        ({"interpolation": "bilinear"}, "color_jitter = 0.4 needs images decoded at every step.*--set augmentation"),
        ({"color_jitter": None, "auto_augment": "rand-m9"}, "auto_augment = rand-m9"),
        ({"color_jitter": None}, "must be bilinear or bicubic, not 'random'"),
    ],
)
def test_what_cannot_be_done_in_memory_is_named(pictures: Tensor, augmentation: dict[str, Any], complaint: str) -> None:
    resident = ResidentImages(pictures, torch.zeros(500))
    with pytest.raises(ConfigError, match=complaint):
        ResidentLoader(resident, EvaluationOrder(500, 10), PREPROCESSING, augmentation, torch.device("cpu"))


def test_unreadable_images_are_named_or_left_out(image_folder: Callable[..., Path]) -> None:
    folder = image_folder()
    (folder / "train" / "a" / "3.png").write_bytes(b"no image")
    sets = open_data(str(folder))
    with pytest.raises(CorruptImageError, match=r"3\.png.*--skip-corrupt"):
        decode_once(sets, PREPROCESSING, Console(quiet=True))
    console = Console(file=io.StringIO(), width=300)
    decoded = decode_once(sets, PREPROCESSING, console, skip_corrupt=True)
    assert len(decoded.train) == 15  # type: ignore[arg-type]
    assert "1 unreadable left out" in console.file.getvalue()  # type: ignore[attr-defined]
    for image in (folder / "val").rglob("*.png"):
        image.write_bytes(b"no image")
    with pytest.raises(CorruptImageError, match="Nor can any other of the validation images"):
        decode_once(open_data(str(folder)), PREPROCESSING, Console(quiet=True), skip_corrupt=True)


def test_images_that_do_not_fit_in_memory_are_refused(image_folder: Callable[..., Path]) -> None:
    sets = open_data(str(image_folder()))
    huge = {**PREPROCESSING, "input_size": (3, 300_000, 300_000)}
    with pytest.raises(
        ConfigError, match=r"16 training images of 3 x 300000 x 300000 bytes need 4320\.0 GB.*leave out"
    ):
        decode_once(sets, huge, Console(quiet=True))


def test_training_from_memory_repeats_itself(
    tmp_path: Path, teacher: FloatModel, digits: ImageSets, recipe: Recipe, console: Console
) -> None:
    sets = decode_once(digits, teacher.spec.preprocessing, console)
    losses = []
    for name in ("one", "two"):
        result = train_quantized(
            teacher, teacher, "q-vit", (4, 4), "head", sets, recipe, Options(tmp_path / name, seed=3), console
        )
        losses.append([record["train_loss"] for record in result.history])
    assert losses[0] == losses[1]
    assert result.accuracy.top1 > 85
