"""An engine goes to another process by pickle: as the path that it was loaded from, or as the bytes."""

from __future__ import annotations

import copy
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from golden import GOLDEN, check_logits, images_of
from packed_models import make_packed
from qvit.errors import ConfigError, PackedFileError
from qvit.format.packed import read_packed
from qvit.runtime import engine as module
from qvit.runtime.engine import Engine, load

CLASSIFIER, EXTRACTOR = GOLDEN / "vit.safetensors", GOLDEN / "features.safetensors"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(CLASSIFIER, "model.safetensors")
    return Path("model.safetensors")


def test_worker_that_was_not_forked_has_the_engine_and_no_pytorch(path: Path, tmp_path: Path) -> None:
    """As of multiprocessing's spawn, Ray and Spark; each is a new process, in whatever folder."""
    script = """
import pickle, sys
engine = pickle.load(sys.stdin.buffer)
assert "torch" not in sys.modules
sys.stdout.buffer.write(engine(pickle.load(sys.stdin.buffer)).tobytes())
"""
    engine = load(path, threads=1)
    images = images_of(engine.program)
    command = [sys.executable, "-c", script]
    given = pickle.dumps(engine) + pickle.dumps(images)
    assert len(pickle.dumps(engine)) < 1000
    done = subprocess.run(command, input=given, capture_output=True, check=True, cwd=tmp_path.parent)
    np.testing.assert_array_equal(np.frombuffer(done.stdout, np.float32).reshape(len(images), -1), engine(images))


def test_bytes_go_along_where_there_is_no_path(path: Path) -> None:
    with path.open("rb") as file:
        engines = [load(path.read_bytes()), load(file)]
    path.unlink()
    for engine in engines:
        check_logits("vit", pickle.loads(pickle.dumps(engine))(images_of(engine.program)))


def test_file_that_is_gone_or_another_is_refused_in_a_sentence(path: Path) -> None:
    pickled = pickle.dumps(load(path))
    shutil.copy(EXTRACTOR, path)
    with pytest.raises(PackedFileError, match="model.safetensors holds another model than when .* put that one back"):
        pickle.loads(pickled)
    path.unlink()
    with pytest.raises(PackedFileError, match="There is no file .*model.safetensors"):
        pickle.loads(pickled)


def test_what_was_chosen_goes_along_and_what_was_not_is_chosen_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, free = (pickle.dumps(load(path, **given)) for given in ({"threads": 3, "instruction_set": "portable"}, {}))
    monkeypatch.setattr(module, "processors", lambda: 7)
    there = pickle.loads(chosen)
    assert (there.threads, there.instruction_set) == (3, "portable")
    assert pickle.loads(free).threads == 7


def test_copies_are_engines_of_their_own(path: Path) -> None:
    engine = load(path)
    for other in (copy.copy(engine), copy.deepcopy(engine)):
        assert other is not engine
        check_logits("vit", other(images_of(engine.program)))


def test_model_in_memory_is_not_pickled() -> None:
    with pytest.raises(ConfigError, match=r"^An engine of a model in memory .* load the file\.$"):
        pickle.dumps(Engine(make_packed()))


def test_repr_says_what_it_is() -> None:
    classifier, extractor = (
        repr(load(path, threads=2, instruction_set="portable")) for path in (CLASSIFIER, EXTRACTOR)
    )
    program = read_packed(CLASSIFIER).program
    size = " x ".join(map(str, program.input))
    end = "threads=2, instruction_set='portable'>"
    assert classifier == f"<qvit.Engine of '{program.name}': {size}, {program.output} classes, {end}"
    assert "vectors of" in extractor
    named = repr(Engine(make_packed(name="a\x1b[31m\n" * 99)))
    assert named.isprintable()
    assert len(named) < 300
