"""The house's order: every module imports only what lies below it, and the runtime wing never sees PyTorch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import SLOW

SOURCE = Path(__file__).parents[1] / "src" / "qvit"
LEVELS = (
    ("qvit.errors", "qvit._version"),
    ("qvit.config", "qvit.files", "qvit.kinds"),
    ("qvit.images",),
    ("qvit.format",),
    ("qvit.runtime", "qvit._kernels"),
    ("qvit.serving",),
    ("qvit.nn",),
    ("qvit.models.lowering", "qvit.models.attention", "qvit.models.parts"),
    ("qvit.models.vit", "qvit.models.swin", "qvit.models.swinv2", "qvit.models.swinv2_cr"),
    ("qvit.models.beit", "qvit.models.relpos", "qvit.models.eva"),
    ("qvit.models.families", "qvit.models.queries"),
    ("qvit.quantization",),
    ("qvit.models",),
    ("qvit.exporting",),
    ("qvit.hub", "qvit.data"),
    ("qvit.analysis",),
    ("qvit.recipes", "qvit.train"),
    ("qvit.bench",),
    ("qvit.study",),
    ("qvit.search",),
    ("qvit.cli",),
)
"""From the ground up. A module's level is that of its longest prefix; modules of one level may import one another."""
NO_TORCH = ("qvit.errors", "qvit._version", "qvit.config", "qvit.files", "qvit.kinds", "qvit.images", "qvit.format")
NO_TORCH += ("qvit.runtime", "qvit.exporting.onnx", "qvit.exporting.web", "qvit.serving")
TRAINING = ("torch", "timm", "torchvision", "accelerate")
MODULES = {
    "qvit." + ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
    if path != SOURCE / "__init__.py"
}


def imported(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, inside functions too; not what only type checkers see."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        yield node
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in names)


def level(module: str) -> int:
    fits = [
        (len(prefix), n) for n, names in enumerate(LEVELS) for prefix in names if f"{module}.".startswith(f"{prefix}.")
    ]
    assert fits, f"{module} has no level: give it one in LEVELS"
    return max(fits)[1]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_nothing_above_it(module: str) -> None:
    names = [name for name in imported(MODULES[module]) if name.startswith("qvit.")]
    assert not [name for name in names if level(name) > level(module)]


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith(NO_TORCH)))
def test_the_ground_and_the_runtime_wing_import_no_training(module: str) -> None:
    assert not [name for name in imported(MODULES[module]) if name.partition(".")[0] in TRAINING]


def test_no_module_imports_itself_through_others() -> None:
    paths = MODULES | {path.stem: path for path in (SOURCE.parents[1] / "benchmarks").glob("*.py")}
    graph = {module: {name for name in imported(path) if name in paths} for module, path in paths.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join((*way[way.index(module) :], module))}"
        if module not in done:
            for name in graph[module]:
                visit(name, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_file_is_longer_than_400_lines() -> None:
    folders = [SOURCE, *(SOURCE.parents[1] / name for name in ("tests", "benchmarks", "examples"))]
    code = (".py", ".cpp", ".h", ".js", ".mjs", ".sh")
    paths = [path for folder in folders for path in folder.rglob("*") if path.suffix in code]
    assert {folder for folder in folders if any(folder in path.parents for path in paths)} == set(folders)
    assert [str(path) for path in paths if len(path.read_text().splitlines()) > 400] == []


def test_files_of_tests_are_named_once_and_slow_ones_are_there() -> None:
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(set(SLOW) - set(names)) == []
    assert sorted({name for name in names if names.count(name) > 1}) == []  # pytest would not collect the second
