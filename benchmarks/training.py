"""Time and memory of a training step: quantization-aware training beside float training.

A step is forward and backward pass: of the float model, of the student alone, and the whole Q-ViT step (teacher,
student and guided distillation). On the CPU each is eager, compiled, and compiled under bfloat16 autocast; on a GPU,
the default where there is one, compiled under bfloat16 autocast. All run in turn in every round of one process, each
twice, of which the second is measured; times are medians. There are two ratios: to the first row, and ("alike") to the
float step that runs in the same way.

Memory is the highest sum of the tensors that a step allocates: on the CPU what PyTorch's allocator hands out (exact and
the same in every run, without the scratch memory of the matrix library), on the GPU torch.cuda.max_memory_allocated.
Weights are not in it, gradients are.

With --profile, torch.profiler's ten most expensive operations or kernels of each step are printed below the table.

Example: python benchmarks/training.py --json training.json
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch._dynamo.config
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qvit import DistillationLoss, QuantConfig, calibrate, quantize

MODELS = {
    "cpu": ("deit_tiny_patch16_224",),
    "cuda": ("deit_small_patch16_224", "deit_tiny_patch16_224", "deit_base_patch16_224"),
}
BATCH = {"cpu": 8, "cuda": 256}
Step = Callable[[], None]


class Way(NamedTuple):
    """How a step is run."""

    compiled: bool
    bf16: bool

    def __str__(self) -> str:
        return f"{'compiled' if self.compiled else 'eager'}{', bf16' if self.bf16 else ''}"


WAYS = {"cpu": (Way(False, False), Way(True, False), Way(True, True)), "cuda": (Way(True, True),)}


def float_step(images: Tensor, labels: Tensor, name: str, way: Way, **model_args: Any) -> Step:
    """Return a step of the float model."""
    model = _float_model(name, images, **model_args).train()
    return _labels_step(_compile(model) if way.compiled else model, images, labels, way)


def student_step(images: Tensor, labels: Tensor, name: str, config: QuantConfig, way: Way, **model_args: Any) -> Step:
    """Return a step of the quantized model against the labels alone."""
    student = _student(_float_model(name, images, **model_args), images, config)
    return _labels_step(_compile(student) if way.compiled else student, images, labels, way)


def q_vit_step(images: Tensor, labels: Tensor, name: str, config: QuantConfig, way: Way, **model_args: Any) -> Step:
    """Return a step with a teacher of the same size and guided distillation."""
    teacher = _float_model(name, images, **model_args)
    student = _student(teacher, images, config)
    loss_fn = DistillationLoss(teacher)
    if way.compiled:
        _compile(teacher)
        _compile(student)

    def step() -> None:
        student.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=way.bf16):
            loss = loss_fn(student, images, labels)
        loss.backward()

    return step


def _labels_step(model: nn.Module, images: Tensor, labels: Tensor, way: Way) -> Step:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=way.bf16):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()

    return step


def _float_model(name: str, images: Tensor, **model_args: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, **model_args).to(images.device).eval()
    return model


def _student(teacher: nn.Module, images: Tensor, config: QuantConfig) -> nn.Module:
    student = quantize(teacher, config)
    calibrate(student, [images[:2]])
    return student.train()


def _compile(model: nn.Module) -> nn.Module:
    model.compile(fullgraph=True)
    return model


def seconds(step: Step, device: torch.device) -> float:
    """Return the time of one step."""
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def peak_megabytes(step: Step, device: torch.device) -> float:
    """Return the highest sum of what one step allocates."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        _wait(device)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 1e6


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def warmed(steps: dict[str, Step], device: torch.device) -> dict[str, float | str]:
    """Return the megabytes of each step, or why there are none, after it has run often enough to be measured."""
    found: dict[str, float | str] = {}
    for name, step in steps.items():
        try:
            step()
            step()  # the first compiles, the second still meets cold caches
            found[name] = peak_megabytes(step, device)
        except torch.cuda.OutOfMemoryError:
            found[name] = "does not fit the GPU's memory"
    return found


def measure(steps: dict[str, Step], rounds: int, batch: int, device: torch.device) -> list[dict[str, Any]]:
    """Return a record per step: seconds, images per second, megabytes, and ratios to float steps.

    Ratios are those to the first step and, as ``alike``, to the float step that runs in the same way. A step that does
    not fit the GPU's memory is left out, and its record says so.
    """
    megabytes = warmed(steps, device)
    running = {name: step for name, step in steps.items() if isinstance(megabytes[name], float)}
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, step in running.items():
            step()  # the heap is as another model's step left it: this one faults pages in that it would have in a run
            times[name].append(seconds(step, device))
    records: list[dict[str, Any]] = []
    for name in steps:
        record: dict[str, Any] = {"step": name}
        records.append(record)
        if name not in running:
            record["error"] = megabytes[name]
            continue
        record |= {"seconds": statistics.median(times[name]), "megabytes": megabytes[name]}
        record["images_per_second"] = batch / record["seconds"]
        for kind, base in (("", next(iter(steps))), ("alike_", f"float, {name.partition(', ')[2]}")):
            if base in running:
                # Round by round, so that a disturbance of the machine meets both.
                pairs = zip(times[name], times[base], strict=True)
                record[f"{kind}time_ratio"] = statistics.median(
                    duration / float_duration for duration, float_duration in pairs
                )
                record[f"{kind}memory_ratio"] = record["megabytes"] / float(megabytes[base])
    return records


def steps_of(name: str, batch: int, config: QuantConfig, device: torch.device, **model_args: Any) -> dict[str, Step]:
    """Return the steps that are compared on a device, the float one first in each way."""
    data = _data(batch, device)
    steps: dict[str, Step] = {}
    for way in WAYS[device.type]:
        steps[f"float, {way}"] = float_step(*data, name, way, **model_args)
        steps[f"student, {way}"] = student_step(*data, name, config, way, **model_args)
        steps[f"Q-ViT, {way}"] = q_vit_step(*data, name, config, way, **model_args)
    return steps


def top_ten(step: Step, device: torch.device) -> str:
    """Return the operations or kernels in which a step spends most of its time, as torch.profiler prints them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        _wait(device)
    table: str = profile.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=10)
    return table


def _data(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, 3, 224, 224, device=device), torch.randint(1000, (batch,), device=device)


def table(title: str, records: list[dict[str, Any]]) -> Table:
    """Return the records as a table for the terminal."""
    result = Table(title=title)
    for column in ("step", "ms", "ratio", "alike", "images/s", "peak MB", "ratio", "alike"):
        result.add_column(column, justify="left" if column == "step" else "right")
    for r in records:
        if "error" in r:
            result.add_row(r["step"], r["error"])
            continue
        time_ratios, memory_ratios = (
            [f"{r[key]:.2f}" if key in r else "" for key in (f"{what}_ratio", f"alike_{what}_ratio")]
            for what in ("time", "memory")
        )
        values = [f"{r['images_per_second']:.1f}", f"{r['megabytes']:.0f}"]
        result.add_row(r["step"], f"{1e3 * r['seconds']:.1f}", *time_ratios, *values, *memory_ratios)
    return result


def cpu_name() -> str:
    """Return the processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    """Measure, print tables and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--device", choices=MODELS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", action="append", help="timm's name; repeatable [default: DeiT's, by device]")
    parser.add_argument("--depth", type=int, help="blocks of a ViT, for a quick look")
    parser.add_argument("--batch", type=int, help=f"[default: {BATCH['cpu']} on the CPU, {BATCH['cuda']} on a GPU]")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true", help="print the ten most expensive operations of each step")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # Steps with and without a recorder's hooks share compiled code here; the compiler is to tell them apart.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    config, device = QuantConfig(arguments.bits, arguments.bits), torch.device(arguments.device)
    batch = arguments.batch or BATCH[device.type]
    environment = {
        "cpu": cpu_name(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "bits": arguments.bits,
        "batch": batch,
        "rounds": arguments.rounds,
        "depth": arguments.depth,
    }
    machine = f"{environment['cpu']}, {arguments.threads} threads"
    if device.type == "cuda":
        environment |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        machine = torch.cuda.get_device_name()
    console = Console()
    model_args = {} if arguments.depth is None else {"depth": arguments.depth}
    results: dict[str, Any] = {}
    for name in arguments.model or MODELS[device.type]:
        torch.compiler.reset()
        steps = steps_of(name, batch, config, device, **model_args)
        results[name] = measure(steps, arguments.rounds, batch, device)
        title = f"{name}, batch {batch}, {machine}, PyTorch {torch.__version__}, timm {timm.__version__}"
        console.print(table(title, results[name]))
        for record in results[name] if arguments.profile else ():
            if "error" not in record:
                print(f"{name}, {record['step']}\n{top_ten(steps[record['step']], device)}", flush=True)
        if arguments.json:  # after each model: the machine may be lent for minutes
            arguments.json.write_text(json.dumps({"environment": environment, "results": results}, indent=1))


if __name__ == "__main__":
    main()
