"""What a command ends in where something goes wrong that is nobody's mistake."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from commands import run, sentence
from qvit.runtime import info


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
    assert said.endswith("fewer --workers or --threads).")


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


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep to RLIMIT_AS")
@pytest.mark.parametrize("megabytes", [5, 20, 40, 60, 80, 100, 150])
def test_predict_under_a_limit_works_or_says_what_it_lacks(packed_file: Path, tmp_path: Path, megabytes: int) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    command = [sys.executable, "-c", UNDER_A_LIMIT, str(megabytes), "predict", packed_file, tmp_path / "a.png"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--threads", "1"], capture_output=True, text=True, check=False, env=environment)
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) == done.stdout.startswith(str(tmp_path))
    # OpenBLAS ends a program by itself, with a line of its own, if its first allocation fails.
    assert done.returncode == 0 or done.stderr.startswith(("qvit: There is not enough memory: ", "OpenBLAS error: "))
