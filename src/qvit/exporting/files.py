"""What ``qvit export`` writes: the file that is asked for by its suffix, from a checkpoint or a packed model.

PyTorch is imported for checkpoints alone, onnx for ONNX files alone.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from qvit.errors import ConfigError
from qvit.files import check_absent
from qvit.kinds import kind_of

PACKED, ONNX = ".safetensors", ".onnx"


def export_file(source: Path, target: Path, *, exact: bool = False, opset: int | None = None) -> None:
    """Write ``target``, a packed model or an ONNX file.

    Args:
        source: a checkpoint; for an ONNX file also a packed model (``.safetensors``).
        target: ``.safetensors`` or ``.onnx``; must not be there.
        exact: of an ONNX file, see :func:`qvit.exporting.onnx_file.onnx_model`.
        opset: of an ONNX file, likewise.

    Raises:
        ConfigError: if that cannot be meant, or the target is there already.
        QvitError: as :func:`qvit.exporting.packed.export_checkpoint` and :func:`qvit.exporting.onnx_file.export_onnx`.
    """
    if target.suffix not in (PACKED, ONNX):
        raise ConfigError(f"{target} must end with {PACKED} (a packed model) or {ONNX}.")
    if target.suffix == PACKED and (exact or opset is not None):
        raise ConfigError(f"--exact and --opset are for ONNX files: {target} must end with {ONNX}.")
    if target.suffix == source.suffix == PACKED:
        kind = kind_of(source)
        if kind is not None and kind.name != "packed":
            raise ConfigError(f"{source} is {kind.text}.")
        raise ConfigError(
            f"{source} is a packed model already: export a checkpoint, or give a name that ends with {ONNX}."
        )
    check_absent(target)
    if target.suffix == PACKED:
        from qvit.exporting.packed import export_checkpoint

        export_checkpoint(source, target)
        return
    from qvit.exporting.onnx_file import export_onnx

    if source.suffix == PACKED:
        export_onnx(source, target, exact=exact, opset=opset)
        return
    from qvit.exporting.packed import export_checkpoint

    with tempfile.TemporaryDirectory(prefix="qvit-export-") as folder:
        packed = Path(folder) / f"model{PACKED}"
        export_checkpoint(source, packed)
        export_onnx(packed, target, exact=exact, opset=opset)
