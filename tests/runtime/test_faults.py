"""What an engine does after a fork, after an exception, and while the interpreter ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from packed_models import make_packed
from qvit import _kernels
from qvit.errors import ConfigError
from qvit.format.packed import write_packed
from qvit.runtime.engine import Engine, load

Images = NDArray[np.float32]
FORKING = """
import os, sys, warnings, numpy, qvit
warnings.simplefilter("ignore")
engine = qvit.load(sys.argv[1], threads=2)
images = numpy.ones((2, 3, 16, 16), numpy.float32)
"""
"""How a script begins that forks with an engine."""
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "model.safetensors"
    write_packed(path, make_packed(4, image_size=(16, 16), register_tokens=50))
    return path


@pytest.fixture(scope="module")
def images() -> Images:
    return np.random.default_rng(1).standard_normal((3, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(path: Path, images: Images) -> Images:
    return load(path, threads=1)(images)


def child(action: Callable[[], bool]) -> int:
    """Return the status of a child process that runs ``action``: 0 if that returns true."""
    pid = os.fork()
    if pid == 0:
        try:
            status = 0 if action() else 1
        except BaseException:
            traceback.print_exc()
            status = 2
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def answers(engine: Engine, images: Images, expected: Images, calls: int = 5) -> bool:
    return all(np.array_equal(engine(images), expected) for _ in range(calls))


@forks
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_child_has_an_engine_of_its_own(path: Path, images: Images, expected: Images, threads: int) -> None:
    engines = [load(path, threads=threads)]
    assert answers(engines[0], images, expected)

    def use_and_destroy() -> bool:
        same = answers(engines[0], images, expected, calls=20)
        engines.clear()
        return same

    assert child(use_and_destroy) == 0
    assert child(lambda: child(use_and_destroy) == 0) == 0
    assert child(lambda: engines.clear() is None) == 0
    assert answers(engines[0], images, expected)


@forks
def test_a_hundred_forks(path: Path) -> None:
    run(
        FORKING
        + """
expected = engine(images)
for _ in range(100):
    assert (engine(images) == expected).all()
    pid = os.fork()
    if not pid:
        os._exit(not all((engine(images) == expected).all() for _ in range(5)))
    assert os.waitpid(pid, 0)[1] == 0
""",
        path,
    )


@forks
@pytest.mark.parametrize("threads", [1, 2])
def test_fork_while_another_thread_is_inside_a_call(path: Path, images: Images, expected: Images, threads: int) -> None:
    engine = load(path, threads=threads)
    many, stop = np.concatenate([images] * 20), threading.Event()

    def call() -> None:
        while not stop.is_set():
            engine(many)

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    try:
        for _ in range(20):
            assert child(lambda: answers(engine, images, expected)) == 0
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    assert answers(engine, images, expected)


@forks
def test_fork_while_another_thread_loads_and_drops_engines(path: Path, images: Images, expected: Images) -> None:
    engine, stop = load(path, threads=2), threading.Event()

    def load_and_drop() -> None:
        while not stop.is_set():
            load(path, threads=2)(images)

    loader = threading.Thread(target=load_and_drop)
    loader.start()
    try:
        for _ in range(20):
            assert child(lambda: answers(engine, images, expected)) == 0
    finally:
        stop.set()
        loader.join()


def run(script: str, *arguments: str | Path) -> None:
    """Run a Python script in a process of its own, with one thread outside of the engine."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


@forks
def test_a_child_that_was_forked_while_codes_are_handed_out_comes_to_its_end(path: Path) -> None:
    """The making of Python's objects may run any code: here the garbage collector's, which forks."""
    run(
        FORKING
        + """
import gc
children = []
def fork(phase, info):
    if not children:
        children.append(os.fork())
trace = engine._model.trace
gc.disable()
gc.callbacks.append(fork)
gc.set_threshold(1)
gc.enable()
trace(images)
gc.disable()
assert children
if children[0]:
    assert os.waitpid(children[0], 0)[1] == 0
""",
        path,
    )


@forks
def test_fork_while_another_thread_opens_an_image(path: Path) -> None:
    """The child waits for no thread that it does not have, and its filters of warnings are its parent's."""
    run(
        FORKING
        + """
import io, signal, threading
from PIL import Image
engine = qvit.load(sys.argv[1], threads=1)
file = io.BytesIO()
Image.new("RGB", (20, 20)).save(file, "PNG")
inside, forking = threading.Event(), threading.Event()
class Slow(io.BytesIO):
    def read(self, *size):
        inside.set()
        forking.wait()
        return super().read(*size)
before = list(warnings.filters)
thread = threading.Thread(target=engine.predict, args=(Slow(file.getvalue()),))
thread.start()
inside.wait()
os.register_at_fork(before=forking.set)
pid = os.fork()
if not pid:
    signal.alarm(60)
    os._exit(engine.predict(file) != engine.predict(file.getvalue()) or warnings.filters != before)
assert os.waitpid(pid, 0)[1] == 0
thread.join()
""",
        path,
    )


@forks
def test_parent_and_child_come_to_their_ends(path: Path) -> None:
    run(
        FORKING
        + """
engine(images)
pid = os.fork()
for _ in range(10):
    engine(images)
if pid:
    assert os.waitpid(pid, 0)[1] == 0
""",
        path,
    )


@pytest.mark.parametrize("call", ["engine(images)", "engine.codes(images[:3])", "engine.profile(images, 1)"])
def test_the_interpreter_ends_while_daemon_threads_call(path: Path, call: str) -> None:
    """A module that is destroyed late gives them time to come back from their calls."""
    script = f"""
import sys, threading, time, types, numpy, qvit
engine = qvit.load(sys.argv[1], threads=2)
images = numpy.zeros((40, 3, 16, 16), numpy.float32)
ready = threading.Barrier(4)
class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(0.1)
sys.modules["late"] = types.ModuleType("late")
sys.modules["late"].slow = Slow()
def work():
    {call}
    ready.wait()
    while True:
        {call}
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
ready.wait()
time.sleep(0.05)
"""
    for _ in range(3):
        run(script, path)


def test_an_engine_works_while_the_interpreter_ends(path: Path) -> None:
    run(
        """
import atexit, sys, numpy
images = numpy.zeros((20, 3, 16, 16), numpy.float32)
atexit.register(lambda: engine(images))
import qvit
engine = qvit.load(sys.argv[1], threads=2)
class Last:
    def __del__(self, engine=engine, images=images):
        engine(images)
last = Last()
""",
        path,
    )


def each_fault(kind: str, action: Callable[[], Any], error: type[Exception], after: Callable[[], bool]) -> int:
    """Let the first, second, ... allocation or start of a thread in ``action`` fail; return how many there are."""
    for number in range(1000):
        _kernels.fail(**{kind: number})
        try:
            action()
        except error:
            assert after(), (kind, number)
        else:
            return number
        finally:
            _kernels.fail()
    raise AssertionError("it never ends")


def test_after_an_allocation_that_failed_in_load(path: Path, images: Images, expected: Images) -> None:
    def after() -> bool:
        return answers(load(path, threads=2), images, expected)

    assert each_fault("allocation", lambda: load(path, threads=2), MemoryError, after) > 20


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("call", ["__call__", "codes", "predict"])
def test_after_an_allocation_that_failed_in_a_call(
    path: Path, images: Images, expected: Images, call: str, before: int
) -> None:
    """Both of a new engine and of one that has worked on fewer images."""
    engines: list[Engine] = []
    given: Any = [Image.new("RGB", (20, 20))] * 3 if call == "predict" else images

    def action() -> None:
        engines[:] = [load(path, threads=2)]
        engines[0](images[:before])
        _kernels.fail(allocation=number[0])
        getattr(engines[0], call)(given)

    number = [0]
    while True:
        try:
            action()
        except MemoryError:
            assert answers(engines[0], images, expected), number
        else:
            break
        finally:
            _kernels.fail()
        number[0] += 1
    assert number[0] > 5


def test_after_a_thread_that_did_not_start(path: Path, images: Images, expected: Images) -> None:
    engines: list[Engine] = []

    def action() -> None:
        engines[:] = [load(path, threads=4)]
        engines[0](images)

    def after() -> bool:
        return answers(engines[0], images, expected)

    assert each_fault("thread", action, ConfigError, after) == 3


def test_threads_that_cannot_start_are_one_sentence(path: Path, images: Images) -> None:
    engine = load(path, threads=2)
    for _ in range(3):
        _kernels.fail(thread=0)
        with pytest.raises(ConfigError, match=r"cannot start 2 threads \(.*\): load it with fewer threads\.$"):
            engine(images)
