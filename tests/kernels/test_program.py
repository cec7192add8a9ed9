"""The kernels' test programs, built for this machine and, where a cross compiler and an emulator are, for aarch64.

It is built in ``build/``, so that only the first run takes the half minute that a compiler needs.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STRICT = "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"
AARCH64 = [
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
    "-DCMAKE_EXE_LINKER_FLAGS=-static",
]


def need(*tools: str, packages: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (Debian: apt-get install {packages})")


def build(name: str, *options: str) -> Path:
    folder = ROOT / "build" / f"kernels-{name}"
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DQVIT_KERNEL_TESTS=ON", STRICT, *options]
    for command in (configure, ["cmake", "--build", str(folder), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return folder


def run(*command: str) -> list[str]:
    """Return the names of the instruction sets that were checked."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split(":")[0] for line in done.stdout.splitlines() if line.endswith(": checked")]


def test_on_this_machine() -> None:
    need("cmake", "c++", packages="cmake g++")
    from qvit import _kernels

    folder = build("native")
    assert run(str(folder / "kernels_test")) == _kernels.instruction_sets()
    run(str(folder / "faults_test"))


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is aarch64: the test above covers it")
def test_on_aarch64() -> None:
    need("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64", packages="cmake g++-aarch64-linux-gnu qemu-user")
    program = str(build("aarch64", *AARCH64) / "kernels_test")
    assert run("qemu-aarch64", "-cpu", "max", program) == ["neon-dot", "portable"]
    assert run("qemu-aarch64", "-cpu", "cortex-a53", program) == ["portable"]  # no dot product


def test_a_warning_ends_a_build_of_ours_and_not_one_of_a_users() -> None:
    """A newer compiler warns of more; here every structure with padding stands for what that may be."""
    need("cmake", "c++", "make", packages="cmake g++ make")
    folder = ROOT / "build" / "kernels-warning"
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Unix Makefiles", "-DQVIT_KERNEL_TESTS=ON"]
    compile_one = ["cmake", "--build", str(folder), "--target", "src/qvit/kernels/calls.o"]
    for strict, status in (("OFF", 0), ("ON", 2)):
        options = ["-DCMAKE_CXX_FLAGS=-Wpadded", f"-DCMAKE_COMPILE_WARNING_AS_ERROR={strict}"]
        subprocess.run([*configure, *options], check=True, capture_output=True)
        done = subprocess.run(compile_one, capture_output=True, text=True)
        assert "padd" in done.stderr
        assert done.returncode == status, done.stderr
    assert STRICT.removeprefix("-D") in (ROOT / "Makefile").read_text(encoding="utf-8")
