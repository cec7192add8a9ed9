from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT_TORCH = """
import sys
from pathlib import Path
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["qvit", "qvit.config", "qvit.errors"])
def test_import_loads_neither_torch_nor_timm(module: str) -> None:
    loaded = run(f"import {module}, sys; print(*sorted(sys.modules))").split()
    assert module in loaded
    assert not {"torch", "timm", "torchvision", "accelerate"} & set(loaded)


@pytest.mark.parametrize(
    ("name", "missing"),
    [("quantize", "torch"), ("calibrate", "torch"), ("DistillationLoss", "torch"), ("quantize", "timm")],
)
def test_training_name_without_its_dependency_names_the_extra(name: str, missing: str) -> None:
    out = run(
        WITHOUT_TORCH.format(blocked=[missing])
        + f"""
import qvit
try:
    qvit.{name}
except qvit.errors.MissingExtraError as error:
    print(isinstance(error, qvit.QvitError), isinstance(error, ImportError), error)
"""
    )
    assert out.startswith("True True ")
    assert missing in out
    assert "pip install 'qvit[train]'" in out


def test_configuration_works_without_torch() -> None:
    out = run(WITHOUT_TORCH.format(blocked=["torch", "timm"]) + "import qvit; print(qvit.QuantConfig(2, 3).bits('x'))")
    assert "weight=2, activation=3" in out


def test_unknown_attribute_is_an_attribute_error() -> None:
    import qvit

    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        qvit.quantise  # noqa: B018


def test_every_public_name_exists() -> None:
    import qvit

    assert all(getattr(qvit, name) is not None for name in qvit.__all__)


def test_no_subpackage_hides_a_public_name() -> None:
    import qvit

    folders = {path.parent.name for path in Path(qvit.__file__).parent.glob("*/__init__.py")}
    modules = {path.stem for path in Path(qvit.__file__).parent.glob("*.py")}
    assert not (folders | modules) & (set(qvit.__all__) - {"errors"})


IMPORTING = """
try:
    import qvit
except Exception as error:
    print([kind.__name__ for kind in type(error).mro()], error, flush=True)
"""


@pytest.mark.parametrize("isolated", [True, False])
def test_sub_interpreter_is_refused_in_a_sentence(isolated: bool) -> None:
    out = run(f"""
try:
    import _interpreters
    number = _interpreters.create("isolated" if {isolated} else "legacy")
except ImportError:
    import _xxsubinterpreters as _interpreters
    number = _interpreters.create(isolated={isolated})
import qvit
_interpreters.run_string(number, {IMPORTING!r})
""")
    assert "QvitError" in out
    assert "'ImportError'" in out
    assert "qvit does not run in a sub-interpreter: import it in the main one" in out


def test_python_without_its_lock_is_refused_in_a_sentence() -> None:
    out = run(f"""
import sys
sys._is_gil_enabled = lambda: False
{IMPORTING}
""")
    assert "QvitError" in out
    assert "'ImportError'" in out
    assert "qvit does not run without Python's global interpreter lock: set PYTHON_GIL=1" in out
