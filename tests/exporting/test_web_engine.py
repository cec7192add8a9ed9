"""The engine of the browser, in Node: the kernels' results bit for bit, and every code held against the reference."""

from __future__ import annotations

import json
import re
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from following import check_codes
from golden import GOLDEN, check_logits, images_of
from node import Node, NodeEngine, NodeError, need_modules
from packed_models import make_packed, random_packed
from programs import programs
from qvit.config import Bits
from qvit.errors import ConfigError
from qvit.exporting.web_file import web_file
from qvit.format.ops import Embed, Layer, Pool
from qvit.format.packed import read_packed
from qvit.format.program import Program
from qvit.runtime.engine import Engine

ROOT = Path(__file__).parents[2]
THREADS = (2, 3)
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
FAMILIES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


@settings(deadline=None, max_examples=25, suppress_health_check=QUIET)
@given(program=programs(), seed=st.integers(0, 2**16))
def test_random_programs_compute_what_the_file_says(node: Node, program: Program, seed: int) -> None:
    packed = random_packed(program, seed)
    images = np.random.default_rng(seed).standard_normal((2, *program.input)).astype(np.float32)
    try:
        native = Engine(packed, threads=1, instruction_set="portable")
    except ConfigError as error:
        with pytest.raises(NodeError, match=re.escape(str(error))):
            NodeEngine(node, packed)(images)
        return
    engine = NodeEngine(node, packed)
    check_codes(packed, engine, images)
    check_same(NodeEngine(node, packed, slow=True), native, images)
    check_same(NodeEngine(node, packed, threads=THREADS[seed % 2]), engine, images)


def check_same(engine: NodeEngine, other: NodeEngine | Engine, images: np.ndarray) -> None:
    """Outputs and every code are equal to the last bit."""
    np.testing.assert_array_equal(engine(images), other(images))
    codes, expected = engine.codes(images), other.codes(images)
    assert codes.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(codes[name], values, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(node: Node, family: str) -> None:
    packed = read_packed(GOLDEN / f"{family}.safetensors")
    images = images_of(packed.program)
    engine = NodeEngine(node, packed)
    check_logits(family, check_codes(packed, engine, images))
    for threads in THREADS:
        check_same(NodeEngine(node, packed, threads=threads), engine, images)


def test_memory_beyond_two_gigabytes_is_addressed(node: Node) -> None:
    packed = read_packed(GOLDEN / "vit.safetensors")
    check_same(NodeEngine(node, packed, high=True), NodeEngine(node, packed), images_of(packed.program))


def test_a_model_that_needs_more_than_can_be_counted_is_refused_in_a_sentence(node: Node) -> None:
    """The bytes of what flows between its layers are a multiple of 2^32, which 32 bits take for none."""
    side, width = 2**8, 2**14
    operations = (Embed((1, 1), Layer("embed", 1, width, Bits(8, 8))), Pool("avg"))
    packed = random_packed(Program("vast", (1, side, side), operations))
    with pytest.raises(NodeError, match=re.escape("vast needs more memory than there is.")):
        NodeEngine(node, packed)(np.zeros((1, 1, side, side), np.float32))


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_number_of_bits(node: Node, bits: int) -> None:
    packed = make_packed(bits, embed_dim=40, head_dim=20, mlp_hidden=150)
    images = np.random.default_rng(bits).standard_normal((3, *packed.program.input)).astype(np.float32)
    check_codes(packed, NodeEngine(node, packed), images)


@pytest.mark.parametrize("instructions", ["simd128", "relaxed-simd"])
def test_products_and_row_operations(instructions: str) -> None:
    """The program that checks the kernels of all processors, on the vectors that Node has."""
    need_modules()
    program = ROOT / "build" / "web" / f"kernels_test-{instructions}.wasm"
    if not program.exists():
        pytest.skip("the engine of the browser was not built here: make web")
    script = """
        import { WASI } from "node:wasi";
        import { readFileSync } from "node:fs";
        import { setFlagsFromString } from "node:v8";
        setFlagsFromString("--experimental-wasm-relaxed-simd"); // which Node 20 needs
        const wasi = new WASI({ version: "preview1" });
        const bytes = readFileSync(process.argv[1]);
        if (WebAssembly.validate(bytes)) {
          const module = new WebAssembly.Module(bytes);
          process.exitCode = wasi.start(new WebAssembly.Instance(module, wasi.getImportObject()));
        }
    """
    command = ["node", "--no-warnings", "--input-type=module", "-e", script, str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if instructions == "relaxed-simd" and not done.stdout:
        pytest.skip("this Node has no relaxed vectors")
    assert done.stdout.startswith(f"{instructions}: checked\nportable: checked\n")


def refusal(node: Node, data: bytes) -> str:
    """Return the sentence with which a file is refused, or an empty text."""
    packed = make_packed(4)
    images = node.put("images", np.zeros((1, *packed.program.input), np.float32))
    try:
        node.call("run", file=node.put("edited.qvit", data), images=images, out=node.folder / "out", slow=False)
    except NodeError as error:
        kind, sentence = error.args
        assert kind == "QvitError", sentence
        assert sentence.endswith(".")
        assert "\n" not in sentence
        assert len(sentence) < 200
        return str(sentence)
    return ""


def split(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(description: object, data: bytes) -> bytes:
    text = json.dumps(description).encode()
    return len(text).to_bytes(8, "little") + text + data


@settings(deadline=None, max_examples=60, suppress_health_check=QUIET)
@given(data=st.data())
def test_an_edited_description_runs_or_is_refused_in_a_sentence(node: Node, data: st.DataObject) -> None:
    description, arrays = split(web_file(make_packed(4, rectifier="token", attention_scale=0.5)))
    places: list[tuple] = []

    def walk(value: object, owner: object, key: object) -> None:
        places.append((owner, key))
        for name, array in (
            value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else [])
        ):
            walk(array, value, name)

    for name in ("parts", "input", "outputs", "classes", "preprocessing", "version"):
        walk(description[name], description, name)
    owner, key = data.draw(st.sampled_from(places))
    if data.draw(st.booleans()) and isinstance(owner, dict):
        del owner[key]
    else:
        odd = st.sampled_from([None, True, 0, -1, 1, 2, 65535, 65536, 2**31, 2**32, 2**53, 1e300, 0.5, "", "x", [], {}])
        owner[key] = data.draw(odd)
    refusal(node, joined(description, arrays))


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda data: b"", "The model cannot be read: it is cut short."),
        (lambda data: data[:7], "The model cannot be read: it is cut short."),
        (lambda data: data[:-1], "The model cannot be read: it was damaged or cut short on its way."),
        (
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            "The model cannot be read: it was damaged or cut short on its way.",
        ),
        (
            lambda data: b"\xff" * 8 + data[8:],
            "The model cannot be read: it is cut short, or no file that qvit web wrote.",
        ),
        (
            lambda data: data[:8] + b"[" + data[9:],
            "The model cannot be read: it is damaged, or no file that qvit web wrote.",
        ),
        (
            lambda data: joined({"version": 2}, b""),
            "The model cannot be read: it is of another version of qvit: run qvit web again.",
        ),
        (
            lambda data: joined(None, b""),
            "The model cannot be read: it is of another version of qvit: run qvit web again.",
        ),
    ],
)
def test_a_damaged_file(node: Node, edit: object, sentence: str) -> None:
    assert refusal(node, edit(web_file(make_packed(4)))) == sentence


MOST = 2**16
"""The largest number that the module takes; the square of it is what 32 bits take for 0."""


def many_heads(parts: list[dict]) -> None:
    """So many heads and channels of each that 32 bits count none of them in all."""
    attention = parts[2]["branches"][0]
    attention |= {"heads": MOST, "head_dim": MOST}
    attention["qkv"] |= {"outputs": 0}
    attention["qkv"]["codes"]["shape"][0] = 0
    attention["proj"] |= {"inputs": 0}
    attention["proj"]["codes"]["shape"][1] = 0
    for array in [attention["qkv"][name] for name in ("scale", "bias")]:
        array["shape"] = [0]
    for operand in ("query", "key", "value", "map"):
        for name in {"scale", "offset"} & attention[operand].keys():
            attention[operand][name]["shape"] = [MOST]
    attention["logit_scale"]["shape"] = [MOST]


def large_patches(parts: list[dict]) -> None:
    parts[0] |= {"patch": [MOST, MOST]}
    parts[0]["layer"] |= {"inputs": 0}
    parts[0]["layer"]["codes"]["shape"][1] = 0


def narrow_windows(parts: list[dict]) -> None:
    parts[2]["branches"][0] |= {"window": [1, 3], "shift": [0, 0]}


def many_pooled(parts: list[dict]) -> None:
    next(part for part in parts if part["op"] == "pool")["tokens"] = MOST


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (many_heads, "needs more memory than there is."),
        (large_patches, ": patch."),
        (narrow_windows, ": window."),
        (many_pooled, ": tokens."),
        (lambda parts: parts.pop(0), ": its first operation alone is to embed."),
        (lambda parts: parts.append(parts[0]), ": its first operation alone is to embed."),
        (lambda parts: parts.clear(), ": it has no operations."),
    ],
)
def test_sizes_that_contradict_one_another_are_refused_before_anything_runs(
    node: Node, edit: Callable[[list[dict]], object], reason: str
) -> None:
    description, arrays = split(web_file(make_packed(4)))
    edit(description["parts"])
    arrays += bytes(8 * MOST)
    description["checksum"] = f"{zlib.crc32(arrays):08x}"
    assert refusal(node, joined(description, arrays)).endswith(reason)


def test_a_file_holds_each_array_once() -> None:
    packed = read_packed(GOLDEN / "eva.safetensors")  # its blocks share the tables of a rotation
    description, arrays = split(web_file(packed))
    assert description["classes"] == packed.classes
    assert len(arrays) <= sum(tensor.nbytes + 3 for tensor in packed.tensors.values())
