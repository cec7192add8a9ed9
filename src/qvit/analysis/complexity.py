"""What a quantized model costs, known before it is trained: parameters, bytes and multiply-adds."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from qvit.analysis.size import Operations
from qvit.config import QuantConfig
from qvit.errors import ConfigError
from qvit.exporting.packed import origin_of
from qvit.format.packed import PackedModel, packed_size, read_packed
from qvit.format.program import Program
from qvit.models.checkpoint import quantized_by, read_checkpoint
from qvit.models.families import lower
from qvit.models.float_models import is_model_name, refuse_misspelt, untrained_spec
from qvit.models.spec import ModelSpec, shape_of
from qvit.quantization.convert import quantize
from qvit.runtime.info import SCALES


@dataclasses.dataclass(frozen=True)
class Complexity:
    """What a quantized model costs.

    Args:
        program: what is computed of one image.
        parameters: of the float model; of a packed file the numbers that it holds but for scales and offsets, since
            it does not tell what was folded.
        file_size: bytes of the packed file, or of the one that the model would be.
    """

    program: Program
    parameters: int
    file_size: int

    @property
    def float_size(self) -> int:
        """Bytes of the parameters in float32."""
        return 4 * self.parameters

    @property
    def operations(self) -> Operations:
        """Multiply-adds of one image."""
        return Operations(self.program.macs())


def complexity(source: str, config: QuantConfig | None = None, image_size: int | None = None) -> Complexity:
    """Return what a model costs; no weights are made of one that is not there yet.

    Args:
        source: timm's name of a model, a checkpoint, or a packed file (``.safetensors``).
        config: bits of a float model, 4 by default; a quantized one has its own.
        image_size: pixels of a side of the images, for a model by name; by default those that it is made for.

    Raises:
        ConfigError: for bits of a quantized model, another size than that of a file, or one that no model can take.
        QvitError: as the readers of either file.
    """
    if is_model_name(source):
        return _of_spec(untrained_spec(source, image_size), config)
    if image_size is not None:
        raise ConfigError(f"{source} is for images of its own size: leave out --image-size, or give a model's name.")
    packed, spec = None, None
    if Path(source).suffix == ".safetensors":
        packed = read_packed(source)
    else:
        refuse_misspelt(source)
        spec, _, _ = read_checkpoint(source)
    if config is not None and (spec is None or spec.quant_config is not None):
        raise ConfigError(f"{source} is quantized and has its own bits: leave out --bits and what belongs to it.")
    if packed is not None:
        return Complexity(packed.program, _numbers(packed.program), Path(source).stat().st_size)
    assert spec is not None
    return _of_spec(spec, config)


def _of_spec(spec: ModelSpec, config: QuantConfig | None) -> Complexity:
    shape = shape_of(spec)
    parameters = sum(parameter.numel() for parameter in shape.parameters())
    if spec.quant_config is None:
        config = config or QuantConfig(rectifier=None)
        student = quantize(shape, config)
        spec = dataclasses.replace(spec, quant_config=config.to_dict())
    else:
        student = quantized_by(shape, spec)
    height, width = spec.preprocessing["input_size"][1:]
    program, _ = lower(student, (height, width))
    file = PackedModel(program, spec.preprocessing, spec.classes, origin_of(spec), {})
    return Complexity(program, parameters, packed_size(file))


def _numbers(program: Program) -> int:
    """Return how many numbers a packed file holds beside scales and offsets: weights by their codes, and the others."""
    others = {
        name: math.prod(shape)
        for name, (_, shape) in program.entries().items()
        if name.rpartition(".")[2] not in ("codes", *SCALES)
    }
    return sum(layer.inputs * layer.outputs for layer in program.layers().values()) + sum(others.values())
