"""Thousands of small changes to files of three families: each is refused in a sentence or runs, and none crashes.

``QVIT_MUTATIONS=10000 make test-sanitize`` (or pytest on this file) asks for more than the suite does.
"""

from __future__ import annotations

import copy
import os
import random
from typing import Any

import numpy as np
import pytest

from family_programs import FAMILIES
from forgery import Forged, take_apart, ways_of
from packed_models import random_packed
from qvit.errors import ConfigError, PackedFileError
from qvit.format.fields import MAX_SIZE
from qvit.format.packed import PackedModel, read_packed, write_packed
from qvit.format.program import OPERATIONS
from qvit.runtime.engine import Engine
from qvit.runtime.reference import ReferenceEngine

MUTATIONS = int(os.environ.get("QVIT_MUTATIONS", "450"))
"""Of all families together."""
AFFORDABLE = 10**8
"""Multiply-adds of a mutated model that is run; another image size may make it large."""
VALUES: list[Any] = [
    *(None, True, False, "", "x", "avg", "token", "pairs", "halves", "swiglu", "relative_position", [], {}),
    *(-1, 0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 12, 16, 24, 32, 48, 255, MAX_SIZE, MAX_SIZE + 1, 2**31, 10**30),
    *(1e-300, 1e-6, 0.5, 1e308, [1, 1], [2, 2], [4, 4], [3, 3], [8, 8], [0, 1], [65535, 65535]),
]
FLOATS = (np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0, 1e-45, 1e-38, 3e38, -3e38, 1e10, 0.5)


def of_the_bytes(content: bytes, chance: random.Random) -> bytes:
    """Flip, remove, put in or overwrite some bytes: a fault of a disk."""
    place, length = chance.randrange(len(content)), chance.choice((1, 1, 1, 4, 8, 60, 300))
    noise = chance.randbytes(length)
    return chance.choice(
        (
            content[:place] + noise + content[place + length :],
            content[:place] + bytes(length) + content[place + length :],
            content[:place] + content[place + length :],
            content[:place] + noise + content[place:],
            content[:place],
        )
    )


def of_the_program(content: bytes, chance: random.Random) -> bytes:
    """Change one to three parts of the header, with a checksum that is right."""
    forged = take_apart(content)
    for _ in range(chance.choice((1, 1, 2, 3))):
        *way, last = chance.choice(ways_of(forged.header))
        part = forged.header
        for step in way:
            part = part[step]
        kind = chance.randrange(6)
        if kind == 0:
            del part[last]
        elif kind == 1 and isinstance(part, list):
            part.insert(last, copy.deepcopy(chance.choice(part)))
        elif kind == 2 and isinstance(part, list):
            chance.shuffle(part)
        elif kind == 3 and type(part[last]) in (int, float):
            part[last] = chance.choice((part[last] + 1, part[last] - 1, part[last] * 2, part[last] // 2, -part[last]))
        elif kind == 4 and last == "op":
            part[last] = chance.choice([*OPERATIONS, "attention", "mlp"])
        else:
            part[last] = copy.deepcopy(chance.choice(VALUES))
    return forged.bytes()


def of_the_index(content: bytes, chance: random.Random) -> bytes:
    """Change where a tensor lies, its dtype, shape or name."""
    forged = take_apart(content)
    name, other = chance.sample(sorted(forged.index), 2)
    kind = chance.randrange(4)
    if kind == 0:
        forged.index[name], forged.index[other] = forged.index[other], forged.index[name]
    elif kind == 1:
        forged.index[other + chance.choice(("", "x"))] = forged.index.pop(name)
    else:
        *way, last = chance.choice(ways_of(forged.index[name]))
        part = forged.index[name]
        for step in way:
            part = part[step]
        part[last] = chance.choice([*VALUES, "F16", "U8", "F32", "I64"])
    return forged.bytes()


def of_the_tensors(content: bytes, chance: random.Random) -> bytes:
    """Change numbers, with a checksum that is right: NaN, infinity, huge, tiny, 0, any codes."""
    forged = take_apart(content)
    for _ in range(chance.choice((1, 2, 5))):
        start, end = forged.index[chance.choice(sorted(forged.index))]["data_offsets"]
        if (end - start) % 4 == 0:
            place = chance.randrange(start, end, 4)
            value = np.float32(chance.choice(FLOATS)).tobytes()
        else:
            place, value = chance.randrange(start, end), chance.randbytes(1)
        forged.data = forged.data[:place] + value + forged.data[place + len(value) :]
    return forged.bytes()


KINDS = (of_the_bytes, of_the_program, of_the_program, of_the_index, of_the_tensors)


@pytest.fixture(scope="module", params=["vit", "swin", "eva"])
def content(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("mutations") / "m.safetensors"
    write_packed(path, random_packed(FAMILIES[request.param]))
    return path.read_bytes()


@pytest.mark.timeout(300 + MUTATIONS)
def test_every_mutation_is_refused_in_a_sentence_or_runs(content: bytes) -> None:
    read = dict.fromkeys(KINDS, 0)
    for seed in range(MUTATIONS // 3):
        chance = random.Random(seed)
        kind = chance.choice(KINDS)
        mutated = kind(content, chance)
        try:
            model = read_packed(mutated)
        except PackedFileError as error:
            message = str(error)
            assert len(message) <= 1000, (kind, seed)
            assert message.isprintable(), (kind, seed)
            assert message.endswith("."), (kind, seed)
            continue
        assert kind is not of_the_bytes or mutated == content, seed
        read[kind] += 1
        run(model)
    # Some must come through to the end, or nothing behind the checks was tried.
    assert read[of_the_program] > 0
    assert read[of_the_tensors] > 0


def run(model: PackedModel) -> None:
    program = model.program
    if sum(product.macs for product in program.products()) > AFFORDABLE:
        return
    images = np.random.default_rng(0).standard_normal((2, *program.input)).astype(np.float32)
    with np.errstate(all="ignore"):
        assert ReferenceEngine(model)(images).shape == (2, program.output)
    try:
        engine = Engine(model, threads=1)
    except ConfigError:  # not every family yet
        return
    assert engine(images).shape == (2, program.output)


def test_forged_file_without_a_change_is_read(content: bytes) -> None:
    forged: Forged = take_apart(content)
    assert read_packed(forged.bytes()).program == read_packed(content).program
