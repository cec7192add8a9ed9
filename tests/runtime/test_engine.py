"""The engine against the NumPy reference: every member of the family, instruction set, thread count and batch size."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from conftest import make_vit
from following import check_codes
from members import DISTILLED, MEMBERS, SIZES, VIT, images_for, packed, student_of
from packed_models import make_packed
from qvit import QuantConfig
from qvit.errors import ConfigError, DataError
from qvit.format.ops import ACTIVATIONS
from qvit.format.packed import read_packed
from qvit.runtime.engine import Engine, instruction_sets, load

BATCHES = (1, 3, 17)
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any], QuantConfig]] = {
    **{name: (model, options, QuantConfig(4, 4)) for name, (model, options) in MEMBERS.items()},
    **{
        f"{bits}_bits_{rectifier}": (VIT, {}, QuantConfig(bits, bits, rectifier=rectifier))
        for bits in (2, 3, 5, 6, 7, 8)
        for rectifier in ("head", "token", None)
    },
    "token_qk_norm": (VIT, {"qk_norm": True}, QuantConfig(4, 4, rectifier="token")),
    "distilled_2_bits": (DISTILLED, {}, QuantConfig(2, 2)),
    "odd_sizes": (
        VIT,
        {"img_size": (20, 12), "num_classes": 10, "in_chans": 1, "embed_dim": 40, "num_heads": 5},
        QuantConfig(3, 2),
    ),
    "mixed": (
        VIT,
        {},
        QuantConfig(4, 4, overrides={"blocks.0.*": (2, 3), "blocks.1.attn.*": (3, 2), "*.fc2": (8, 5)}),
    ),
}


def pictures(model: str, options: dict[str, Any], name: str, count: int = 17) -> NDArray[np.float32]:
    size = SIZES.get(name, options.get("img_size", (16, 16)))
    shape = (count, options.get("in_chans", 3), *size)
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_are_the_references(name: str, tmp_path: Path) -> None:
    model, options, config = CONFIGURATIONS[name]
    images = pictures(model, options, name)
    calibration = images_for(images.shape[1], images.shape[2:])
    path = tmp_path / "model.safetensors"
    file = packed(student_of(make_vit(model, **options), calibration, config), path, calibration)
    for isa in instruction_sets():
        by_threads = []
        for threads in (1, 2, 3):
            engine = load(path, threads=threads, instruction_set=isa)
            logits = [engine(images[:batch]) for batch in BATCHES]
            for batch, got in zip(BATCHES, logits, strict=True):
                np.testing.assert_array_equal(got, logits[-1][:batch])  # an image's logits do not depend on the others
            by_threads.append(logits[-1])
        np.testing.assert_array_equal(by_threads[1], by_threads[0])
        np.testing.assert_array_equal(by_threads[2], by_threads[0])
        np.testing.assert_array_equal(check_codes(file, engine, images), by_threads[0])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "model.safetensors"
    calibration = images_for(3, (16, 16))
    packed(student_of(make_vit(VIT), calibration, QuantConfig(4, 4)), path, calibration)
    return path


@pytest.fixture(scope="module")
def images() -> NDArray[np.float32]:
    return pictures(VIT, {}, "plain", 5)


@pytest.mark.parametrize("isa", instruction_sets())
def test_repeated_calls_are_identical(isa: str, path: Path, images: NDArray[np.float32]) -> None:
    engine = load(path, threads=2, instruction_set=isa)
    first = engine(images)
    for _ in range(20):
        np.testing.assert_array_equal(engine(images), first)


def test_calls_from_several_threads_take_turns(path: Path, images: NDArray[np.float32]) -> None:
    engine = load(path, threads=2)
    alone = [engine(images[:batch]) for batch in (1, 2, 3, 5)]
    results: dict[int, list[NDArray[np.float32]]] = {}

    def call(thread: int) -> None:
        results[thread] = [engine(images[: (1, 2, 3, 5)[thread]]) for _ in range(25)]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 1, 2, 3]
    for thread, logits in results.items():
        for got in logits:
            np.testing.assert_array_equal(got, alone[thread])


def test_an_engine_leaves_its_model_whole(path: Path, images: NDArray[np.float32]) -> None:
    model = read_packed(path)
    tensors = dict(model.tensors)
    first = Engine(model)(images)
    assert model.tensors.keys() == tensors.keys()
    assert all(model.tensors[name] is array for name, array in tensors.items())
    np.testing.assert_array_equal(Engine(model)(images), first)


def test_load_frees_the_tensors_that_it_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = read_packed(path)
    monkeypatch.setattr("qvit.runtime.engine.read_packed", lambda source: model)
    load(path)
    assert not model.tensors


def test_no_images(path: Path) -> None:
    engine, images = load(path), np.empty((0, 3, 16, 16), np.float32)
    assert engine(images).shape == (0, 10)
    assert {codes.shape[0] for codes in engine.codes(images).values()} == {0}
    assert engine.predict([]) == []


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 16, 16), (2, 3, 16, 12), (2, 3, 16, 16, 1)])
def test_wrong_shape_is_refused(path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"takes images of shape \(B, 3, 16, 16\)"):
        load(path)(np.zeros(shape, np.float32))


@pytest.mark.parametrize("dtype", ["uint8", "int64", "bool", "complex64", "U1", "object"])
def test_images_of_no_fractions_are_refused(path: Path, dtype: str) -> None:
    """A picture's own numbers among them: what comes of them would be of no picture."""
    with pytest.raises(DataError, match=r"preprocessed, of type float32, not .*: predict and embed take pictures"):
        load(path)(np.ones((1, 3, 16, 16), dtype))


@pytest.mark.parametrize("images", [None, [[1.0], [1.0, 2.0]], "x", torch.zeros(1, 3, 16, 16, requires_grad=True)])
def test_what_is_no_array_is_refused(path: Path, images: Any) -> None:
    with pytest.raises(DataError, match="takes images"):
        load(path)(images)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["float64", ">f4", "float16"])
def test_other_fractions_are_rounded_to_float32(path: Path, dtype: str) -> None:
    engine = load(path, threads=1)
    images = np.random.default_rng(0).normal(size=(2, 3, 16, 32)).astype(dtype)[..., ::-2]
    np.testing.assert_array_equal(engine(images), engine(np.ascontiguousarray(images, np.float32)))
    np.testing.assert_array_equal(engine(images.tolist()), engine(images))
    large = np.full((1, 3, 16, 16), np.finfo(dtype).max, dtype)
    large[0, 0, 0, 0] *= -1
    if dtype == "float64":
        with pytest.raises(DataError, match="infinity"):
            engine(large)
    else:
        assert np.isfinite(engine(large)).all()


@pytest.mark.parametrize("top_k", [0, -1, 1.5, None])
def test_wrong_number_of_classes_is_refused(path: Path, top_k: Any) -> None:
    with pytest.raises(ConfigError, match="top_k must be a whole number from 1 up"):
        load(path).predict([np.zeros((16, 16, 3), np.uint8)], top_k)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(path: Path, images: NDArray[np.float32], value: float) -> None:
    broken = images.copy()
    broken[3, 1, 7, 2] = value
    with pytest.raises(DataError, match="NaN or an infinity"):
        load(path)(broken)


@pytest.mark.parametrize("threads", [0, -1, 1.5, 10**5])
def test_wrong_number_of_threads_is_refused(path: Path, threads: Any) -> None:
    with pytest.raises(ConfigError, match="threads must be a whole number from 1 to 1024"):
        load(path, threads=threads)


def test_unknown_instruction_set_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="'sse9', it has .*portable"):
        load(path, instruction_set="sse9")


def test_best_instruction_set_is_the_default(path: Path) -> None:
    engine: Engine = load(path)
    assert engine.instruction_set == instruction_sets()[0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_few_codes_after_an_activation_are_the_references(activation: str) -> None:
    for offset in (0.0, -0.3, 0.4):
        for scale in (0.05, 0.3, 1.0):  # steps below the function's minimum, across it and above it
            model = make_packed(2, activation=activation, seed=3)
            for name, array in model.tensors.items():
                if name.endswith(("fc2.input_offset", "fc2.input_scale")):
                    array[...] = offset if name.endswith("offset") else scale
            images = np.random.default_rng(0).standard_normal((9, 3, *model.program.input[1:])).astype(np.float32)
            for isa in instruction_sets():
                check_codes(model, Engine(model, threads=1, instruction_set=isa), images)


@pytest.mark.parametrize("hidden", [14, 48, 80, 144])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_gate_of_its_own_may_have_any_width(bits: int, hidden: int) -> None:
    """Widths whose padding to 16 channels is no multiple of the products' group: up and gate lie side by side."""
    model = make_packed(bits, mlp="swiglu", mlp_hidden=hidden, activation="silu")
    images = np.random.default_rng(0).standard_normal((9, 3, *model.program.input[1:])).astype(np.float32)
    for isa in instruction_sets():
        check_codes(model, Engine(model, threads=1, instruction_set=isa), images)


def test_a_profile_is_of_its_own_calls_alone_and_their_mean() -> None:
    """No more seconds than went by; those of other calls and of other profiles would be many times that."""
    engine = Engine(make_packed(4), threads=1)
    images = np.zeros((8, *engine.program.input), np.float32)
    engine.profile(images, repeats=300)
    start = time.perf_counter()
    profile = engine.profile(images, repeats=30)
    assert 0 < 30 * sum(profile.values()) <= time.perf_counter() - start
    for _ in range(300):
        engine(images)
    assert not any(seconds for _, seconds in engine._model.profile())


def test_classes_of_large_and_of_equal_logits_have_their_probabilities_in_order() -> None:
    engine = Engine(make_packed(4, class_count=20), threads=1)
    logits = np.full((2, 20), -2000, np.float32)
    logits[0, 3:], logits[1, [7, 4]] = 1000, 2000
    equal, pair = engine.most_probable(logits, 17)
    assert equal == [(name, pytest.approx(1 / 17)) for name in engine.classes[3:]]
    assert pair[:3] == [(engine.classes[4], 0.5), (engine.classes[7], 0.5), (engine.classes[0], 0.0)]


def test_classes_are_of_logits_that_are_the_models() -> None:
    engine = Engine(make_packed(4, class_count=3), threads=1)
    assert engine.most_probable([[0, 0, 1]], 1)[0][0][0] == engine.classes[2]  # type: ignore[arg-type]
    for logits in (np.zeros(3), np.zeros((1, 4)), np.zeros((1, 2))):
        with pytest.raises(DataError, match=r"has logits \(B, 3\), not \("):
            engine.most_probable(logits, 1)
    with pytest.raises(DataError, match="logits hold a NaN"):
        engine.most_probable(np.full((1, 3), np.nan), 1)


def test_an_engine_takes_no_more_threads_than_it_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvit.runtime.engine.processors", lambda: 5000)
    assert Engine(make_packed(4)).threads == 1024
