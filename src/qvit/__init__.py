"""qvit: vision transformers at 4, 3 and 2 bits, trained with Q-ViT and fully quantized.

``import qvit`` loads no PyTorch; the first use of a name of the training wing does.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import TYPE_CHECKING, Any

from qvit import errors
from qvit._version import __version__
from qvit.config import QuantConfig
from qvit.errors import QvitError

if TYPE_CHECKING:
    from qvit.analysis.agreement import agreement
    from qvit.exporting.packed import export
    from qvit.models.checkpoint import load_checkpoint
    from qvit.models.keeping import save_checkpoint
    from qvit.quantization.calibrate import calibrate
    from qvit.quantization.convert import quantize
    from qvit.quantization.distill import DistillationLoss
    from qvit.quantization.reconstruct import reconstruct
    from qvit.runtime.engine import Engine, load
    from qvit.search.find import search_bits

__all__ = [
    "DistillationLoss",
    "Engine",
    "QuantConfig",
    "QvitError",
    "__version__",
    "agreement",
    "calibrate",
    "errors",
    "export",
    "load",
    "load_checkpoint",
    "quantize",
    "reconstruct",
    "save_checkpoint",
    "search_bits",
]

_HOMES = {
    "Engine": "runtime.engine",
    "load": "runtime.engine",
    "save_checkpoint": "models.keeping",
    "load_checkpoint": "models.checkpoint",
    "quantize": "quantization.convert",
    "calibrate": "quantization.calibrate",
    "reconstruct": "quantization.reconstruct",
    "agreement": "analysis.agreement",
    "export": "exporting.packed",
    "search_bits": "search.find",
    "DistillationLoss": "quantization.distill",
}


def _is_in_main_interpreter() -> bool:
    for name in ("_interpreters", "_xxsubinterpreters"):  # from Python 3.13 on, and before
        with contextlib.suppress(ImportError, AttributeError):
            interpreters: Any = importlib.import_module(name)
            return bool(interpreters.get_current() == interpreters.get_main())
    return True


# NumPy breaks off with a page of advice there or warns, and then the engine may wait for ever (Python 3.10).
if not _is_in_main_interpreter():
    raise errors.UnsupportedPythonError(
        "qvit does not run in a sub-interpreter: import it in the main one (mod_wsgi: WSGIApplicationGroup %{GLOBAL})."
    )
# The kernels' module would turn the lock on again for the whole program, or race without it.
if not getattr(sys, "_is_gil_enabled", lambda: True)():
    raise errors.UnsupportedPythonError(
        "qvit does not run without Python's global interpreter lock: set PYTHON_GIL=1, or take the ordinary build."
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qvit' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"qvit.{_HOMES[name]}")
    except ModuleNotFoundError as missing:
        if (missing.name or "qvit").partition(".")[0] == "qvit":
            raise
        raise errors.MissingExtraError(
            f"qvit.{name} needs {missing.name}, part of the training extra: pip install 'qvit[train]'."
        ) from missing
    return getattr(module, name)
