"""Two builds of qvit side by side: the time of the same random DeiT models, in alternating turns of two processes.

Each build has a checkout and an environment of its own; the models are written by the build that runs them, with the
same random numbers. One process per build loads a model and waits; the parent lets them make one call at a time, by
turns, so that whatever else the machine does falls on both alike. Printed are the medians, their ratio, and the median
of the ratios of neighbouring turns, which drifts of the machine hardly touch. With --node it is the browser's engine,
of which `make web` makes the modules, in Node.js.

Example: python benchmarks/before_and_after.py ../old . --models deit_tiny_patch16_224 --bits 4 2 --batches 1 8
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from workers import Worker

WORK = """
import sys, time
from pathlib import Path
checkout, folder, model, bits, batch, threads, activation_bits, instruction_set = sys.argv[1:]
sys.path.insert(0, f"{checkout}/benchmarks")
import numpy as np
from random_models import write_random
from qvit.runtime.engine import load
mixed = {"activation_bits": int(activation_bits)} if activation_bits else {}
file = write_random(Path(folder) / "model.safetensors", model, int(bits), **mixed)
engine = load(file, threads=int(threads), instruction_set=instruction_set or None)
images = np.random.default_rng(0).standard_normal((int(batch), 3, 224, 224)).astype(np.float32)
for _ in range(3):
    logits = engine(images)
print(float(np.abs(logits).sum()), flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    engine(images)
    print(time.perf_counter() - start, flush=True)
"""

NODE_SITE = """
import os, sys
from pathlib import Path
checkout, folder, model, bits, batch, threads, activation_bits, script, *options = sys.argv[1:]
sys.path.insert(0, f"{checkout}/benchmarks")
from qvit.exporting.web_site import write_site
from random_models import write_random
mixed = {"activation_bits": int(activation_bits)} if activation_bits else {}
write_site(write_random(Path(folder) / "model.safetensors", model, int(bits), **mixed), Path(folder) / "site")
os.execvp("node", ["node", *options, "--input-type=module", "-e", script, f"{folder}/site", batch, threads])
"""

NODE_WORK = """
import { createInterface } from "node:readline";
const [site, batch, threads] = process.argv.slice(1);
const { load } = await import(`${site}/qvit.js`);
const model = await load(`${site}/model.qvit`, { threads: Number(threads) });
const images = Float32Array.from({ length: batch * 3 * 224 * 224 }, (_, index) => Math.sin(index));
let logits;
for (let call = 0; call < 3; ++call) logits = await model.run(images);
console.log(logits.reduce((sum, logit) => sum + Math.abs(logit), 0));
for await (const _ of createInterface({ input: process.stdin })) {
  const start = performance.now();
  await model.run(images);
  console.log((performance.now() - start) / 1e3);
}
"""


class Build:
    """A process of one build, which makes one call whenever it is asked."""

    def __init__(self, checkout: Path, folder: str, work: str, case: tuple[str, int, int], options: list[str]) -> None:
        python = checkout / ".venv" / "bin" / "python"
        command = [str(python), "-c", work, str(checkout), folder, *map(str, case), *options]
        self._worker = Worker(command, {**os.environ, "OMP_NUM_THREADS": "1"})
        self.checksum = float(self._worker.ready)
        self.close = self._worker.close

    def seconds(self) -> float:
        """Return the time of one call."""
        self._worker.tell()
        return float(self._worker.answer())


def main() -> None:
    """Measure and print one table; status 1 if outputs differ or a ratio is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout of the old build, with its .venv")
    parser.add_argument("after", type=Path, help="checkout of the new build, with its .venv")
    parser.add_argument("--models", nargs="+", default=["deit_tiny_patch16_224", "deit_small_patch16_224"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 2])
    parser.add_argument("--activation-bits", type=int, help="those of the weights by default")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--instruction-set", default="", help="the best one by default")
    parser.add_argument("--node", nargs="?", const="", metavar="OPTIONS", help="Node.js, with these options of its own")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--limit", type=float, default=1.02, help="largest ratio that passes")
    arguments = parser.parse_args()
    options = [str(arguments.threads), str(arguments.activation_bits or "")]
    if arguments.node is None:
        work, options = WORK, [*options, arguments.instruction_set]
    else:
        work, options = NODE_SITE, [*options, NODE_WORK, *arguments.node.split()]
    table = Table("model", "bits", "batch", "before (ms)", "after (ms)", "ratio", "ratio of turns", "outputs")
    failed = False
    for case in [(m, b, n) for m in arguments.models for b in arguments.bits for n in arguments.batches]:
        with contextlib.ExitStack() as stack:
            builds = []
            for checkout in (arguments.before, arguments.after):
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qvit-builds-"))
                builds.append(Build(checkout.resolve(), folder, work, case, options))
                stack.callback(builds[-1].close)
            turns = [[build.seconds() for build in builds] for _ in range(arguments.rounds)]
            before, after = (statistics.median(times) for times in zip(*turns, strict=True))
            paired = statistics.median(new / old for old, new in turns)
            same = builds[0].checksum == builds[1].checksum
            failed |= not same or paired > arguments.limit
            figures = (f"{1e3 * before:.2f}", f"{1e3 * after:.2f}", f"{after / before:.3f}", f"{paired:.3f}")
            table.add_row(*map(str, case), *figures, "the same" if same else "DIFFER")
    Console(width=110).print(table)
    sys.exit(failed)


if __name__ == "__main__":
    main()
