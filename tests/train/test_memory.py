"""A training whose address space is limited."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest

import jobs
from commands import run

LARGE = ["--set", "model_args.embed_dim=96", "--set", "full_precision.batch_size=1024"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep to RLIMIT_AS")
def test_a_batch_that_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    process = jobs.start(_train, tmp_path)
    process.join()
    assert process.exitcode == 2
    said = (tmp_path / "said").read_text()
    assert "qvit: There is not enough memory: " in said
    assert "can't allocate memory" in said
    assert "Traceback" not in said


def _train(folder: Path) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (100 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    arguments = ["train", jobs.MODEL, "--full-precision", "--data", "digits", "--cpu", "--out", folder / "run", *LARGE]
    done = run(*arguments)
    (folder / "said").write_text(done.err)
    sys.exit(done.status)
