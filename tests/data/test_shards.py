import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pictures import PREPROCESSING
from qvit.data.datasets import Images
from qvit.data.loader import make_loader, make_transform, readable
from qvit.data.order import Rank
from qvit.data.shards import read_shards
from qvit.data.sources import open_data, open_validation
from qvit.errors import CorruptImageError, DataError
from qvit.images import suffixes

MakeShard = Callable[..., Path]


@pytest.fixture
def shard(tmp_path: Path) -> MakeShard:
    """Return a maker of shards whose ``n``-th image is all of grey ``10 n`` and of class ``n mod 2``."""

    def make(name: str, numbers: range, extra: dict[str, bytes] | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files: dict[str, bytes] = {}
        for n in numbers:
            file = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), 10 * n, np.uint8)).save(file, "PNG")
            files |= {f"x/{n:04}.png": file.getvalue(), f"x/{n:04}.cls": str(n % 2).encode()}
        with tarfile.open(path, "w") as tar:
            for key, content in (files | (extra or {})).items():
                info = tarfile.TarInfo(key)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return make


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_read_whole_by_all_processes_together(tmp_path: Path, shard: MakeShard, workers: int) -> None:
    shard("train/a-0.tar", range(9))
    shard("train/a-1.tar", range(9, 13))
    shard("val/b-0.tar", range(13, 16))
    sets = open_data(str(tmp_path))
    assert sets.classes == ["0", "1"]
    assert (len(sets.train), len(sets.val)) == (13, 3)  # type: ignore[arg-type]
    seen = []
    for process in range(2):
        loader = make_loader(
            sets.train,
            make_transform(PREPROCESSING),
            4,
            shuffle=False,
            workers=workers,
            rank=Rank(process, 2),
        )
        for batch in readable(loader, skip_corrupt=False):
            greys = ((batch.images[:, 0, 0, 0] / 2 + 0.5) * 255 / 10).round().int().tolist()
            assert batch.labels.tolist() == [grey % 2 for grey in greys]
            seen += greys
    assert sorted(seen) == list(range(13))


def test_shards_of_both_splits_in_one_folder(tmp_path: Path, shard: MakeShard) -> None:
    shard("imagenet-train-0.tar", range(4))
    shard("imagenet-validation-0.tar", range(4, 6))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    sets = open_data(f"wds/{tmp_path}")
    assert (len(sets.train), len(sets.val), sets.classes) == (4, 2, ["cat", "dog"])  # type: ignore[arg-type]
    assert len(open_validation(f"wds/{tmp_path}", ["cat", "dog"])) == 2  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no shard with 'test'"):
        open_data(f"wds/{tmp_path}", splits="train,test")


def test_shard_that_is_no_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match=r"a.tar cannot be read as an uncompressed tar"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"cat", b"1000000", b"-1"])
def test_image_without_class_number_is_named(tmp_path: Path, shard: MakeShard, content: bytes) -> None:
    shard("a.tar", range(2), {"x/0001.cls": content})
    with pytest.raises(DataError, match=r"a.tar has no class number for x/0001"):
        open_data(str(tmp_path))


def test_corrupt_image_in_a_shard_is_named(tmp_path: Path, shard: MakeShard) -> None:
    path = shard("a.tar", range(20), {"x/0007.png": b"\x89PNG broken"})
    train = open_data(str(tmp_path)).train
    assert isinstance(train, Images)
    with pytest.raises(CorruptImageError, match=rf"{path} \(image at byte \d+\)"):
        list(readable(make_loader(train, make_transform(PREPROCESSING), 4, shuffle=False), skip_corrupt=False))


def test_unreadable_training_image_is_replaced_and_counted(tmp_path: Path, shard: MakeShard) -> None:
    shard("train/a.tar", range(18), {"x/0007.png": b"", "x/0008.png": b""})
    shard("val/a.tar", range(2))
    train = open_data(str(tmp_path)).train
    batches = list(readable(make_loader(train, make_transform(PREPROCESSING), 9, shuffle=True), skip_corrupt=True))
    assert [len(batch.labels) for batch in batches] == [9, 9]
    assert sum(len(batch.unreadable) for batch in batches) == 2


def test_every_suffix_that_the_decoder_reads_is_taken(tmp_path: Path, shard: MakeShard) -> None:
    wanted = sorted(suffixes())
    extra = {f"y/{n}{suffix.upper()}": b"x" for n, suffix in enumerate(wanted)}
    shard("a.tar", range(2), extra | {f"y/{n}.cls": b"1" for n in range(len(wanted))})
    _, labels, left_out = read_shards([tmp_path / "a.tar"])
    assert labels == [0, 1] + [1] * len(wanted)
    assert not left_out


def test_what_a_shard_leaves_out_is_said_once(
    tmp_path: Path, shard: MakeShard, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = dict.fromkeys(
        ("x/._0001.png", "__MACOSX/x/0001.png", "x/0001.json", "y/1.heif", "x/0001.txt", "README"), b"x"
    )
    shard("train/a.tar", range(4), {**extra, "y/1.cls": b"1"})
    shard("val/a.tar", range(4))
    (tmp_path / "val" / "._a.tar").write_bytes(b"no tar")
    (tmp_path / "val" / "classes.txt").write_text("cat\ndog\n")
    sets = open_data(str(tmp_path))
    assert len(sets.train) == len(sets.val) == 4  # type: ignore[arg-type]
    assert capsys.readouterr().err.splitlines() == [
        f"qvit: {tmp_path}/train: left out 2 hidden files and litter, 1 .json files, 1 .heif files, 1 .txt files, "
        "1 files without a suffix and 1 more.",
        f"qvit: {tmp_path}/val: left out 1 hidden files and litter.",
    ]


def test_two_images_of_one_name_are_refused(tmp_path: Path, shard: MakeShard) -> None:
    shard("a.tar", range(2), {"x/0001.tif": b"x"})
    with pytest.raises(DataError, match=r"a.tar has two images called x/0001: which one is meant\?"):
        open_data(str(tmp_path))


def test_links_in_a_shard_are_no_images(tmp_path: Path, shard: MakeShard) -> None:
    path = shard("a.tar", range(4))
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"x/{int(kind)}.png")
            info.type, info.linkname = kind, "x/0001.png"
            tar.addfile(info)
    images, _, left_out = read_shards([path])
    assert len(images) == 4
    assert left_out == {".png files": 2}


def test_one_shard_is_never_of_both_splits(tmp_path: Path, shard: MakeShard) -> None:
    shard("train-interval-0.tar", range(4))
    shard("val-0.tar", range(4))
    with pytest.raises(DataError, match="train-interval-0.tar is of both splits, its name has train and val"):
        open_data(f"wds/{tmp_path}", splits="train,val")
    with pytest.raises(DataError, match="two different names"):
        open_data(f"wds/{tmp_path}", splits="train")


def test_class_names_that_are_no_text_are_refused(tmp_path: Path, shard: MakeShard) -> None:
    shard("a.tar", range(4))
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="classes.txt cannot be read as text"):
        open_data(str(tmp_path))


def test_a_shard_of_a_whole_folder_is_read(tmp_path: Path, shard: MakeShard) -> None:
    """``tar cf a.tar .`` puts ``./`` before every name, which is no hidden folder."""
    with tarfile.open(shard("b", range(4))) as tar, tarfile.open(tmp_path / "a.tar", "w") as dotted:
        for member in tar:
            member.name = f"./{member.name}"
            dotted.addfile(member, tar.extractfile(member))
    images, labels, left_out = read_shards([tmp_path / "a.tar"])
    assert (len(images), labels, left_out) == (4, [0, 1, 0, 1], {})


def test_a_file_with_holes_is_no_image(tmp_path: Path, shard: MakeShard) -> None:
    """Its bytes do not stand one after the other."""
    path = shard("a.tar", range(2))
    with tarfile.open(path, "a") as tar:
        sparse = tarfile.TarInfo("x/0009.png")
        sparse.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(sparse)
    images, _, left_out = read_shards([path])
    assert (len(images), left_out) == (2, {".png files": 1})


def test_a_class_that_the_training_images_lack_is_refused(tmp_path: Path, shard: MakeShard) -> None:
    shard("train/a.tar", range(4))
    shard("val/b.tar", range(4), {"x/0001.cls": b"2"})
    with pytest.raises(DataError, match="val has an image of class 2, and there are 2 classes"):
        open_data(str(tmp_path))
