"""The runtimes that a user would pick instead of qvit's engine, each set up as it is fastest on a CPU.

All run the float model of the same architecture, with random weights: speed does not depend on them. Shapes are static,
one thread pool of the given size works on one inference, and every optimisation that the runtime offers is on.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qvit.files import write_atomically
from qvit.format.program import Program

if TYPE_CHECKING:
    from torch import nn

Images = NDArray[np.float32]
Runner = Callable[[Images], NDArray[np.float32]]
"""Images ``(B, C, H, W)``, float32, to logits ``(B, classes)``."""
CALIBRATION_IMAGES = 4
"""Random images, one at a time: the ranges that they set do not change what the int8 models cost."""
HOLDS = {"avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}}
"""By instruction set, the environment variables that hold PyTorch (with Inductor, oneDNN, MKL) and OpenVINO to it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What all runtimes have in common in one comparison.

    Args:
        program: of the packed model; the float models are built after it.
        batch: images an inference.
        threads: of every runtime.
        onnx: where the float model of this batch size is, or will be, as an ONNX file (:func:`export_onnx`).
        instruction_set: that all are held to; each uses the best one of the processor by default.
    """

    program: Program
    batch: int
    threads: int
    onnx: Path
    instruction_set: str | None = None

    def images(self, seed: int = 0) -> Images:
        """Return normally distributed images, as preprocessing gives them."""
        shape = (self.batch, *self.program.input)
        return np.random.default_rng(seed).standard_normal(shape, np.float32)


@dataclasses.dataclass(frozen=True)
class Peer:
    """A runtime to compare with.

    Args:
        title: its name for people.
        packages: that it needs.
        load: how a model is loaded into it.
        held: whether :data:`HOLDS` can hold it to an instruction set.
    """

    title: str
    packages: tuple[str, ...]
    load: Callable[[Case], Runner]
    held: bool = False

    def versions(self) -> str:
        """Return the packages with their versions.

        Raises:
            ModuleNotFoundError: naming the first one that is not installed.
        """
        try:
            return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in self.packages)
        except importlib.metadata.PackageNotFoundError as error:
            raise ModuleNotFoundError(f"{error.name} is not installed", name=error.name) from error


def _float_model(case: Case) -> nn.Module:
    from qvit.models.from_program import float_model

    return float_model(case.program)


def export_onnx(case: Case) -> Path:
    """Return the case's ONNX file, a float model with a static batch size; it is written if it is not there yet."""
    import torch

    if not case.onnx.exists():
        program = torch.onnx.export(
            _float_model(case),
            (torch.from_numpy(case.images()),),
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        write_atomically(case.onnx, lambda temporary: program.save(temporary, external_data=False))
    return case.onnx


def _torch_eager(case: Case, dtype: str = "float32") -> Runner:
    model = _float_model(case)
    import torch

    _torch_threads(case.threads)
    return _torch_runner(model.to(getattr(torch, dtype)), dtype)


def _torch_compile(case: Case, dtype: str = "float32") -> Runner:
    import torch

    _torch_threads(case.threads)
    torch._dynamo.reset()
    # Frozen weights are folded and laid out for the matrix products once.
    model = _float_model(case).to(getattr(torch, dtype))
    return _torch_runner(torch.compile(model, dynamic=False, options={"freezing": True}), dtype)


def _torch_runner(model: Any, dtype: str) -> Runner:
    """Return what runs a model of that type; images and logits are converted, as its users have to."""
    import torch

    def run(images: Images) -> NDArray[np.float32]:
        with torch.no_grad():
            logits: NDArray[np.float32] = model(torch.from_numpy(images).to(getattr(torch, dtype))).float().numpy()
        return logits

    return run


def _torch_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)


def _onnxruntime(case: Case) -> Runner:
    return onnx_session(export_onnx(case), case.threads)


def _onnxruntime_transformers(case: Case) -> Runner:
    from onnxruntime.transformers.optimizer import optimize_model

    path = case.onnx.with_suffix(".transformers.onnx")
    # It finds heads and width by itself; attention of today's PyTorch export it does not fuse, norms and GELU it does.
    optimize_model(str(export_onnx(case)), model_type="vit", num_heads=0, hidden_size=0).save_model_to_file(str(path))
    return onnx_session(path, case.threads)


def _onnxruntime_int8_dynamic(case: Case) -> Runner:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = case.onnx.with_suffix(".dynamic.onnx")
    quantize_dynamic(_prepared(case), path, weight_type=QuantType.QInt8, per_channel=True)
    return onnx_session(path, case.threads)


def _onnxruntime_int8_static(case: Case) -> Runner:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    path = case.onnx.with_suffix(".static.onnx")
    quantize_static(
        _prepared(case),
        path,
        _Calibration(case),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    return onnx_session(path, case.threads)


class _Calibration:
    """Random images, as :func:`onnxruntime.quantization.quantize_static` reads them."""

    def __init__(self, case: Case) -> None:
        self.batches: Iterator[Images] = (case.images(seed) for seed in range(CALIBRATION_IMAGES))

    def get_next(self) -> dict[str, Images] | None:
        """Return the next batch, or ``None`` after the last."""
        images = next(self.batches, None)
        return None if images is None else {"images": images}


def _prepared(case: Case) -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = case.onnx.with_suffix(".prepared.onnx")
    quant_pre_process(export_onnx(case), path, skip_symbolic_shape=True)  # shapes are static and already there
    return path


def onnx_session(path: Path, threads: int) -> Runner:
    """Return what runs an ONNX file, whose input is called ``images``, in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Images) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(None, {"images": images})[0]
        return logits

    return run


def _openvino(case: Case) -> Runner:
    import openvino

    return openvino_request(openvino.Core().read_model(export_onnx(case)), case.threads, INFERENCE_PRECISION_HINT="f32")


def _openvino_as_it_comes(case: Case) -> Runner:
    import openvino

    return openvino_request(openvino.Core().read_model(export_onnx(case)), case.threads)


def _openvino_int8(case: Case) -> Runner:
    import logging

    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    images = [case.images(seed) for seed in range(CALIBRATION_IMAGES)]
    model = nncf.quantize(
        openvino.Core().read_model(export_onnx(case)),
        nncf.Dataset(images),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=CALIBRATION_IMAGES,
    )
    # Held to AVX2, it would still take bfloat16 for what is not int8, and then find no code for it.
    settings = {} if case.instruction_set is None else {"INFERENCE_PRECISION_HINT": "f32"}
    return openvino_request(model, case.threads, **settings)


def openvino_request(model: Any, threads: int, **settings: str) -> Runner:
    """Return what runs one of OpenVINO's models of one input, tuned for latency; ``settings`` are the plugin's."""
    import openvino

    settings |= {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": str(threads)}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def run(images: Images) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = request.infer([images], share_inputs=True)[0]
        return logits

    return run


_EXPORT = ("torch", "timm", "onnx", "onnxscript")
PEERS = {
    "torch": Peer("PyTorch eager, float32", ("torch", "timm"), _torch_eager, held=True),
    "torch-compile": Peer("PyTorch compile, float32", ("torch", "timm"), _torch_compile, held=True),
    "torch-bf16": Peer("PyTorch eager, bfloat16", ("torch", "timm"), partial(_torch_eager, dtype="bfloat16")),
    "torch-compile-bf16": Peer(
        "PyTorch compile, bfloat16", ("torch", "timm"), partial(_torch_compile, dtype="bfloat16")
    ),
    "onnxruntime": Peer("ONNX Runtime, float32", ("onnxruntime", *_EXPORT), _onnxruntime),
    "onnxruntime-transformers": Peer(
        "ONNX Runtime, transformer optimizer", ("onnxruntime", *_EXPORT), _onnxruntime_transformers
    ),
    "onnxruntime-dynamic": Peer("ONNX Runtime, int8 dynamic", ("onnxruntime", *_EXPORT), _onnxruntime_int8_dynamic),
    "onnxruntime-static": Peer("ONNX Runtime, int8 static QDQ", ("onnxruntime", *_EXPORT), _onnxruntime_int8_static),
    "openvino": Peer("OpenVINO, float32", ("openvino", *_EXPORT), _openvino, held=True),
    "openvino-default": Peer("OpenVINO, as it comes", ("openvino", *_EXPORT), _openvino_as_it_comes),
    "openvino-int8": Peer("OpenVINO, int8 (NNCF)", ("openvino", "nncf", *_EXPORT), _openvino_int8, held=True),
}
"""By the name that ``qvit bench --peers`` takes."""
