"""Time and memory of a training step: quantization-aware training beside float training.

A step is forward and backward pass. On the CPU: float32, the student alone, and the whole Q-ViT step (teacher, student
and guided distillation), each eager and compiled; all run in turn in every round of one process, times are medians and
ratios those to float32 eager. On a GPU, if there is one: float and student and Q-ViT steps compiled under bfloat16
autocast, for each of the DeiT sizes, ratios to the compiled float step.

Memory is the highest sum of the tensors that a step allocates: on the CPU what PyTorch's allocator hands out (exact and
the same in every run, without the scratch memory of the matrix library), on the GPU torch.cuda.max_memory_allocated.
Weights are not in it, gradients are.

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
from typing import Any

import timm
import torch
import torch._dynamo.config
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qvit import DistillationLoss, QuantConfig, calibrate, quantize

CPU_MODEL = "deit_tiny_patch16_224"
GPU_MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
Step = Callable[[], None]


def float_step(images: Tensor, labels: Tensor, name: str, *, compiled: bool, **model_args: Any) -> Step:
    """Return a step of the float model."""
    model = _float_model(name, images, **model_args).train()
    return _labels_step(_compile(model) if compiled else model, images, labels)


def student_step(
    images: Tensor, labels: Tensor, name: str, config: QuantConfig, *, compiled: bool, **model_args: Any
) -> Step:
    """Return a step of the quantized model against the labels alone."""
    student = _student(_float_model(name, images, **model_args), images, config)
    return _labels_step(_compile(student) if compiled else student, images, labels)


def q_vit_step(
    images: Tensor, labels: Tensor, name: str, config: QuantConfig, *, compiled: bool, **model_args: Any
) -> Step:
    """Return a step with a teacher of the same size and guided distillation."""
    teacher = _float_model(name, images, **model_args)
    student = _student(teacher, images, config)
    loss_fn = DistillationLoss(teacher)
    if compiled:
        _compile(teacher)
        _compile(student)

    def step() -> None:
        student.zero_grad(set_to_none=True)
        with _autocast(images):
            loss = loss_fn(student, images, labels)
        loss.backward()

    return step


def _labels_step(model: nn.Module, images: Tensor, labels: Tensor) -> Step:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        with _autocast(images):
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


def _autocast(images: Tensor) -> torch.autocast:
    return torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda)


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


def measure(steps: dict[str, Step], rounds: int, batch: int, device: torch.device) -> list[dict[str, Any]]:
    """Return a record per step: seconds, ratio to the first, images per second, megabytes, ratio to the first.

    A step that does not fit the GPU's memory is left out, and its record says so.
    """
    records: list[dict[str, Any]] = []
    running: dict[str, Step] = {}
    for name, step in steps.items():
        record: dict[str, Any] = {"step": name}
        try:
            step()
            step()  # the first compiles, the second still meets cold caches
            record["megabytes"] = peak_megabytes(step, device)
            running[name] = step
        except torch.cuda.OutOfMemoryError:
            record["error"] = "does not fit the GPU's memory"
        records.append(record)
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, step in running.items():
            times[name].append(seconds(step, device))
    base = records[0]
    for record in records:
        if record["step"] in running:
            record["seconds"] = statistics.median(times[record["step"]])
            record["images_per_second"] = batch / record["seconds"]
        if "seconds" in record and "seconds" in base:
            # Round by round, so that a disturbance of the machine meets both.
            pairs = zip(times[record["step"]], times[base["step"]], strict=True)
            record["time_ratio"] = statistics.median(seconds / base_seconds for seconds, base_seconds in pairs)
            record["memory_ratio"] = record["megabytes"] / base["megabytes"]
    return records


def cpu_steps(name: str, batch: int, config: QuantConfig, **model_args: Any) -> dict[str, Step]:
    """Return the six steps that are compared on the CPU, float32 eager first."""
    data = _data(batch, torch.device("cpu"))
    steps: dict[str, Step] = {}
    for way, compiled in (("eager", False), ("compiled", True)):
        steps[f"float32, {way}"] = float_step(*data, name, compiled=compiled, **model_args)
        steps[f"student, {way}"] = student_step(*data, name, config, compiled=compiled, **model_args)
        steps[f"Q-ViT, {way}"] = q_vit_step(*data, name, config, compiled=compiled, **model_args)
    return steps


def gpu_steps(name: str, batch: int, config: QuantConfig) -> dict[str, Step]:
    """Return the three steps of one model that are compared on a GPU, the float one first."""
    data = _data(batch, torch.device("cuda"))
    return {
        f"{name} float": float_step(*data, name, compiled=True),
        f"{name} student": student_step(*data, name, config, compiled=True),
        f"{name} Q-ViT": q_vit_step(*data, name, config, compiled=True),
    }


def _data(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, 3, 224, 224, device=device), torch.randint(1000, (batch,), device=device)


def table(title: str, records: list[dict[str, Any]]) -> Table:
    """Return the records as a table for the terminal."""
    result = Table(title=title)
    for column in ("step", "ms", "ratio", "images/s", "peak MB", "ratio"):
        result.add_column(column, justify="left" if column == "step" else "right")
    for r in records:
        if "error" in r:
            result.add_row(r["step"], r["error"])
            continue
        ratios = [f"{r[key]:.2f}" if key in r else "" for key in ("time_ratio", "memory_ratio")]
        result.add_row(
            r["step"],
            f"{1e3 * r['seconds']:.1f}",
            ratios[0],
            f"{r['images_per_second']:.1f}",
            f"{r['megabytes']:.0f}",
            ratios[1],
        )
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
    parser.add_argument("--batch", type=int, default=8, help="on the CPU")
    parser.add_argument("--gpu-batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", default=CPU_MODEL, help="timm's name of the model on the CPU")
    parser.add_argument("--depth", type=int, help="blocks of a ViT on the CPU, for a quick look")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # Steps with and without a recorder's hooks share compiled code here; the compiler is to tell them apart.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    config = QuantConfig(arguments.bits, arguments.bits)
    environment = {
        "cpu": cpu_name(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "bits": arguments.bits,
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "model": arguments.model,
        "depth": arguments.depth,
    }
    console = Console()
    model_args = {} if arguments.depth is None else {"depth": arguments.depth}
    steps = cpu_steps(arguments.model, arguments.batch, config, **model_args)
    results = {"cpu": measure(steps, arguments.rounds, arguments.batch, torch.device("cpu"))}
    title = (
        f"{arguments.model}, batch {arguments.batch}, {environment['cpu']}, {arguments.threads} "
        f"threads, PyTorch {torch.__version__}, timm {timm.__version__}"
    )
    console.print(table(title, results["cpu"]))
    if torch.cuda.is_available():
        environment |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "gpu_batch": arguments.gpu_batch,
        }
        for name in GPU_MODELS:
            torch.compiler.reset()
            steps = gpu_steps(name, arguments.gpu_batch, config)
            results[name] = measure(steps, arguments.rounds, arguments.gpu_batch, torch.device("cuda"))
            title = f"Compiled, bfloat16 autocast, batch {arguments.gpu_batch}, {environment['gpu']}"
            console.print(table(title, results[name]))
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": environment, "results": results}, indent=1))


if __name__ == "__main__":
    main()
