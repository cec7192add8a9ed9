"""What a command ends in where something goes wrong that is nobody's mistake."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import typer
from PIL import Image
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel

import qvit
from commands import run, sentence
from conftest import TINY, make_vit
from members import images_for, student_of
from qvit.cli.app import TOGETHER, app, help_text
from qvit.cli.ending import less_memory
from qvit.errors import TrainingStopped
from qvit.models.checkpoint import write_checkpoint
from qvit.models.spec import describe
from qvit.runtime import info
from qvit.train.distributed import shard
from qvit.train.lock import LOCK


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized checkpoint."""
    arguments = {name: value for name, value in TINY.items() if name != "num_classes"}
    config = qvit.QuantConfig(2, 2)
    spec = describe("vit_tiny_patch16_224", arguments, [f"class {n}" for n in range(10)], {})
    path = tmp_path_factory.mktemp("student") / "q.pt"
    model = student_of(make_vit(), images_for(3, (16, 16)), config)
    write_checkpoint(path, dataclasses.replace(spec, quant_config=config.to_dict()), model)
    return path


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


# The messages as the libraries write them.
SHORTAGES = [
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8 bytes. Error code 12 (Cannot allocate memory)"
    ),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("can't start new thread"),
    ImportError("\nA page of advice\n\nOriginal error was: libopenblas.so: failed to map segment from shared object\n"),
    caused(ImportError("Error importing numpy"), ImportError("libopenblas.so: failed to map segment")),  # NumPy 1
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000, 1000, 1000) and data type float64"),
]


@pytest.mark.parametrize("error", SHORTAGES)
def test_a_want_of_memory_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr(info, "info_tables", fail)
    said = sentence(run("info", "m.safetensors"))
    assert said.startswith("qvit: There is not enough memory: ")
    assert "advice" not in said
    assert said.endswith("Free some or raise the limit.")


@pytest.mark.parametrize("command", app.registered_commands, ids=lambda command: command.callback.__name__)
def test_less_memory_is_asked_for_by_options_that_the_command_has(command: typer.models.CommandInfo) -> None:
    assert command.callback is not None
    name = command.callback.__name__.replace("_", "-")
    options = re.findall(r"--[\w-]+", less_memory(command.callback))
    assert bool(options) or name not in ("quantize", "train", "eval", "predict", "bench")
    assert set(options) <= set(re.findall(r"--[\w-]+", run(name, "--help").out))


@pytest.mark.parametrize(
    ("arguments", "empty"),
    [
        (["predict", "", "a.png"], "Argument 2"),
        (["predict", "m.safetensors", ""], "Argument 3"),
        (["export", "last.pt", ""], "Argument 3"),
        (["quantize", "deit_tiny_patch16_224", "--images", "photos", "--out", ""], "--out"),
        (["quantize", "deit_tiny_patch16_224", "--images", "photos", "--out", "m", "--report="], "--report"),
        (["train", "deit_tiny_patch16_224", "--data", "", "--out", "run"], "--data"),
        (["info", "--", ""], "Argument 3"),
    ],
)
def test_an_empty_argument_is_refused_before_it_is_this_folder(arguments: list[str], empty: str) -> None:
    assert sentence(run(*arguments)) == f"qvit: {empty} is empty: say what is meant, or leave it out."


def test_commands_have_no_help_where_python_keeps_no_docstrings() -> None:
    assert help_text(lambda: None) == ""


def threads_of_gloo() -> set[str]:
    """Return the numbers of gloo's threads in this process; Linux alone tells them."""
    numbers = set()
    for folder in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # of a thread that has ended
            if "gloo" in (folder / "comm").read_text():
                numbers.add(folder.name)
    return numbers


@pytest.mark.parametrize("stopped", [False, True])
def test_a_command_leaves_the_processes_that_it_ran_with(stopped: bool, monkeypatch: Any) -> None:
    """And the threads of their group end: one that lets go of a tensor after Python's end would end the program."""

    def last_of_it(path: Path) -> list[Table]:
        for spread in (DistributedDataParallel, shard):
            student = student_of(make_vit(depth=1), images, qvit.QuantConfig(8, 8)).train()
            model = spread(student) or student  # shards in place
            model(images).sum().backward()
        assert bool(threads_of_gloo() - others) == Path("/proc/self/task").exists()
        if stopped:
            raise TrainingStopped("Stopped by SIGTERM at the end of epoch 1.")
        return []

    monkeypatch.setattr(info, "info_tables", last_of_it)
    images, others = images_for(3, (16, 16)), threads_of_gloo()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert run("info", "m.safetensors").status == (143 if stopped else 0)
        assert not dist.is_initialized()
        assert not threads_of_gloo() - others
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_no_command_is_a_mistake_that_shows_the_help() -> None:
    done = run()
    assert done.status == 2
    assert not done.out
    assert "Commands:" in done.err


@pytest.mark.parametrize("command", app.registered_commands, ids=lambda command: command.callback.__name__)
def test_processes_of_torchrun_never_write_the_same_files(
    command: typer.models.CommandInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.callback is not None
    name = command.callback.__name__.replace("_", "-")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        done = run(name, "--no-such-option")
        assert done.status == 2
        if name in TOGETHER:
            assert "No such option" in done.err
        elif rank == 0:
            assert f"qvit {name} runs in one process: start it without torchrun" in sentence(done)
        else:
            assert not done.err


SIGNALLED = {
    "bench": ("qvit.bench.compare._rounds", ["--batch", "1", "--threads", "1", "--peers", "none"]),
    "compare": ("qvit.study.comparison.interleaved", ["{student}", "--images", "{images}"]),
    "complexity": ("qvit.study.complexity.compare", ["--measure"]),
    "export": ("qvit.exporting.onnx_file.export_onnx", ["{out}/m.onnx"]),
    "web": ("pathlib.Path.rename", ["--out", "{temporary}/site"]),
    "analyze": ("qvit.study.analysis.write_analysis", ["--images", "{images}", "--cpu", "--out", "{temporary}"]),
    "push": ("huggingface_hub.HfApi.create_repo", ["me/model"]),
}
"""By commands that work in a temporary folder: what is called while it is there, and what follows the model."""


@pytest.mark.parametrize("command", SIGNALLED)
def test_sigterm_leaves_no_temporary_folder(
    command: str, student: Path, packed_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, temporary = tmp_path / "images", tmp_path / "temporary"
    temporary.mkdir()
    images.mkdir()
    Image.new("RGB", (16, 16)).save(images / "a.png")
    found: list[Path] = []

    def terminate(*_: object, **__: object) -> None:
        found.extend(temporary.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was to end this")

    name, arguments = SIGNALLED[command]
    monkeypatch.setattr(name, terminate)
    get_temp_dir()  # of multiprocessing, which keeps one until the process ends, is made before
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr("qvit.exporting.web_site._static_files", dict)  # what only a build has
    monkeypatch.setattr("qvit.exporting.web_site._keeping", lambda files: {})
    model = packed_file if command in ("bench", "complexity", "web") else student
    places = {"student": student, "images": images, "temporary": temporary, "out": tmp_path}
    more = [argument.format(**places) for argument in arguments]
    before = signal.getsignal(signal.SIGTERM)
    assert sentence(run(command, model, *more), 143) == "qvit: Stopped by SIGTERM."
    assert found
    assert {path.name for path in temporary.iterdir()} <= {LOCK}
    assert signal.getsignal(signal.SIGTERM) is before


def test_every_temporary_folder_is_one_that_sigterm_removes() -> None:
    source = Path(qvit.__file__).parent
    users = [
        path for path in source.rglob("*.py") if re.search(r"TemporaryDirectory|mkdtemp|mkstemp", path.read_text())
    ]
    assert len(users) == len(SIGNALLED)


@pytest.mark.parametrize("error", [RuntimeError("The size of tensor a (3) must match"), ImportError("no such name")])
def test_a_fault_of_qvit_is_no_want_of_memory(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr(info, "info_tables", fail)
    with pytest.raises(type(error), match=str(error)[:8]):
        run("info", "m.safetensors")


UNDER_A_LIMIT = """
import resource, sys
from qvit.cli.app import main

pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (int(sys.argv.pop(1)) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
main()
"""


# Where little is missing, `import numpy` itself dies by SIGSEGV or waits for ever. So limits between those at which its
# libraries cannot be mapped and those that are enough count from a process that has it.
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep to RLIMIT_AS")
@pytest.mark.parametrize(
    ("loaded", "megabytes"),
    [*(("", size) for size in (5, 20, 40, 150)), *(("import numpy", size) for size in (1, 2, 5, 10, 15, 20, 40))],
)
def test_predict_under_a_limit_works_or_says_what_it_lacks(
    packed_file: Path, tmp_path: Path, loaded: str, megabytes: int
) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    program = f"{loaded}\n{UNDER_A_LIMIT}"
    command = [sys.executable, "-c", program, str(megabytes), "predict", packed_file, tmp_path / "a.png"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--threads", "1"], capture_output=True, text=True, check=False, env=environment)
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) == done.stdout.startswith(str(tmp_path))
    # OpenBLAS ends a program by itself, with a line of its own, if its first allocation fails.
    said = done.stderr.startswith("qvit: ") and "not enough memory" in done.stderr
    assert done.returncode == 0 or said or done.stderr.startswith("OpenBLAS error: ")
