import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pictures import PREPROCESSING
from qvit.data.datasets import Images
from qvit.data.loader import make_loader, make_transform, readable
from qvit.data.order import Rank
from qvit.data.sources import ImageSets, open_data, open_validation
from qvit.errors import CorruptImageError, DataError
from qvit.images import open_picture


def test_digits_split_is_stratified_disjoint_and_whole(digits: ImageSets) -> None:
    train, val = digits.train, digits.val
    assert isinstance(train, Images)
    assert isinstance(val, Images)
    assert len(train) + len(val) == 1797
    counts = Counter(val.labels)
    assert max(counts.values()) - min(counts.values()) <= 2
    assert not {id(image) for image in train.sources} & {id(image) for image in val.sources}


def test_digits_keep_their_sixteen_levels(digits: ImageSets) -> None:
    picture, label = digits.train[0]
    image = picture.whole()
    assert image.mode == "L"
    assert image.size == (8, 8)
    assert set(np.asarray(image).ravel().tolist()) <= {round(level * 255 / 16) for level in range(17)}
    assert 0 <= label < 10


def test_folder_with_train_and_val(image_folder: Callable[..., Path]) -> None:
    sets = open_data(str(image_folder()))
    assert sets.classes == ["a", "b"]
    assert (len(sets.train), len(sets.val)) == (16, 8)  # type: ignore[arg-type]


def test_single_folder_holds_out_a_tenth_of_each_class(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(splits={".": 20})
    first, second = open_data(str(folder)), open_data(str(folder))
    assert isinstance(first.val, Images)
    assert isinstance(second.val, Images)
    assert Counter(first.val.labels) == {0: 2, 1: 2}
    assert first.val.sources == second.val.sources


def test_torchvision_folder_through_timm(image_folder: Callable[..., Path]) -> None:
    sets = open_data("torch/image_folder", root=str(image_folder()))
    assert sets.classes == ["a", "b"]
    assert (len(sets.train), len(sets.val)) == (16, 8)  # type: ignore[arg-type]


def test_absent_timm_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="torch/cifar10"):
        open_data("torch/cifar10", root=str(tmp_path))


def test_folder_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path)):
        open_data(str(tmp_path))


def test_train_without_val_is_refused(image_folder: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="has train/ and no val/"):
        open_data(str(image_folder(splits={"train": 2})))


def test_validation_of_a_plain_folder_is_all_of_it(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(splits={".": 3})
    assert len(open_validation(str(folder), ["a", "b"])) == 6  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_stops_with_its_name(image_folder: Callable[..., Path], workers: int) -> None:
    folder = image_folder()
    (folder / "train" / "a" / "3.png").write_bytes(b"\x89PNG broken")
    loader = make_loader(open_data(str(folder)).train, make_transform(PREPROCESSING), 4, shuffle=False, workers=workers)
    with pytest.raises(CorruptImageError, match=r"train/a/3.png .*--skip-corrupt"):
        list(readable(loader, skip_corrupt=False))


def test_corrupt_images_are_skipped_and_counted(image_folder: Callable[..., Path]) -> None:
    folder = image_folder()
    for n in (1, 5):
        (folder / "train" / "b" / f"{n}.png").write_bytes(b"")
    loader = make_loader(open_data(str(folder)).train, make_transform(PREPROCESSING), 4, shuffle=False)
    batches = list(readable(loader, skip_corrupt=True))
    assert sum(len(batch.labels) for batch in batches) == 14
    assert sum(len(batch.unreadable) for batch in batches) == 2


def test_evaluation_transform_is_exact_at_the_image_size(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (255, 0, 128))
    tensor = make_transform(PREPROCESSING)(open_picture(image))
    expected = torch.tensor([1.0, -1.0, 128 / 127.5 - 1])
    torch.testing.assert_close(tensor, expected[:, None, None].expand(3, 8, 8), atol=1e-6, rtol=0)


def test_repeated_augmentation_shows_an_image_three_times(image_folder: Callable[..., Path]) -> None:
    data = open_data(str(image_folder(splits={"train": 150, "val": 1}))).train
    loader = make_loader(data, make_transform(PREPROCESSING), 30, shuffle=True, repeats=3)
    chosen = Counter(sample.image for batch in loader.batch_sampler for sample in batch)
    assert len(chosen) == 100
    assert set(chosen.values()) == {3}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_is_augmented_alike_in_whatever_process(digits: ImageSets, workers: int) -> None:
    preprocessing = {
        "input_size": (1, 8, 8),
        "mean": (0.5,),
        "std": (0.5,),
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bilinear",
    }
    augmentation = {"scale": [0.3, 1.0], "hflip": 0.5, "re_prob": 0.5, "auto_augment": "rand-m9-mstd0.5-inc1"}
    transform = make_transform(preprocessing, {**augmentation, "color_jitter": None})

    def batches(workers: int, rank: Rank) -> list[torch.Tensor]:
        torch.manual_seed(workers)
        loader = make_loader(digits.train, transform, 64, shuffle=True, workers=workers, seed=5, rank=rank)
        return [batch.images for batch in itertools.islice(loader, 3)]

    alone = batches(0, Rank())
    first, second = (batches(workers, Rank(process, 2)) for process in range(2))
    for whole, part, other_part in zip(alone, first, second, strict=True):
        assert torch.equal(whole[0::2], part)
        assert torch.equal(whole[1::2], other_part)
