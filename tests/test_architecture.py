"""The house: a module imports only from packages above it, and the light packages never load torch."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsevit_cli

PACKAGE = Path(sparsevit_cli.__file__).parent
ROOT = PACKAGE.parents[1]
ORDER = (  # noqa: SIM905
    "__init__ errors atomic documents sizes seeding sparsity schedule windows kernels config reporting stopping ranks "
    "commands runs winner search swin acceleration checkpoints torch_files weights models backbones data tasks "
    "evaluation profiling runtimes training exporting workflows console views cli"
).split()
"""From top to bottom; a module may import from its own package and from those before it."""

LIGHT = (
    "errors",
    "sparsity",
    "schedule",
    "sizes",
    "seeding",
    "config.loading",
    "search.engine",
    "search.ledger",
    "console",
    "cli",
    "winner",
)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


def imported_packages(path: Path) -> set[str]:
    """Rooms of the package that a file imports when it is loaded; inside functions and for types alone is free."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    here = dotted(path)
    package = here if path.name == "__init__.py" else here[:-1]
    packages: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                target = (*base, *(node.module.split(".") if node.module else ()))
                packages.update([target[0]] if target else [alias.name for alias in node.names])
            elif node.module and node.module.split(".")[0] == "sparsevit_cli":
                target = tuple(node.module.split(".")[1:])
                packages.update([target[0]] if target else [alias.name for alias in node.names])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return packages & set(ORDER)


@pytest.mark.parametrize("path", modules(), ids=lambda path: ".".join(dotted(path)))
def test_a_module_imports_only_from_packages_above(path: Path) -> None:
    package = dotted(path)[0]
    assert package in ORDER, f"{package} has no place in the order"
    below = {other for other in imported_packages(path) if ORDER.index(other) > ORDER.index(package)}
    assert not below, f"{'.'.join(dotted(path))} imports from {sorted(below)}"


def test_a_task_is_known_to_its_own_package_alone() -> None:
    """Everything else knows `Task`; which class it is, the configuration's name decides."""
    for path in modules():
        here = dotted(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
            named |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            for module in named:
                found = re.search(r"tasks\.(\w+)", module)
                if found and found[1] != "task" and "config" not in module:
                    assert here[:2] == ("tasks", found[1]), f"{path}:{node.lineno}"  # type: ignore[attr-defined]


OF_CLASSIFICATION = re.compile("top1|class_names|num_classes|logits")
HEADS_OWN_PLACES = {("config", "classification")}
"""Where the settings of a classifier's head are."""


def test_no_identifier_outside_tasks_is_of_classification() -> None:
    for path in modules():
        if dotted(path)[0] == "tasks" or dotted(path) in HEADS_OWN_PLACES:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name")]
            found = [name for name in names if isinstance(name, str) and OF_CLASSIFICATION.search(name)]
            assert not found, f"{path}:{node.lineno} {found}"  # type: ignore[attr-defined]


def test_the_page_lists_the_packages_in_their_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("## The packages, in import order")[2].partition("\n## ")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = [name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)]
    assert listed == ORDER[1:]


def test_light_packages_do_not_load_torch() -> None:
    code = f"""
import importlib, sys
for name in {LIGHT!r}:
    importlib.import_module("sparsevit_cli." + name)
heavy = {{"torch", "timm", "numpy", "matplotlib", "sklearn", "onnx"}} & set(sys.modules)
assert not heavy, heavy
import sparsevit_cli
assert sparsevit_cli.SearchSpace((2, 2, 6, 2)).dense.is_dense
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_resolve_and_others_do_not() -> None:
    for name in sparsevit_cli.__all__:
        assert getattr(sparsevit_cli, name).__module__.startswith("sparsevit_cli")
    assert set(sparsevit_cli.__all__) <= set(dir(sparsevit_cli))
    with pytest.raises(AttributeError):
        _ = sparsevit_cli.nothing  # type: ignore[attr-defined]


SCRIPTS = [path for folder in ("benchmarks", "docs", "examples") for path in (ROOT / folder).glob("*.py")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_import_what_there_is(path: Path) -> None:
    """Nobody starts most of them for months, and mypy reads the package alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            wanted = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, name in wanted:
            if module.partition(".")[0] == "sparsevit_cli":
                there = name is None or hasattr(importlib.import_module(module), name)
                assert there or importlib.util.find_spec(f"{module}.{name}"), f"{path.name}:{node.lineno} {name}"


def test_nothing_unsafe_is_called() -> None:
    """No pickle of ours, no eval, no shell, no unsafe YAML or torch loading (reliability: T10)."""
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "dill", "joblib", "marshal", "shelve"} & {n.split(".")[0] for n in names}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load"), path
                assert not called.endswith((".model_construct", ".copy_and_set_values")), "no unvalidated configuration"
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("shell") != "True", path
                assert called != "torch.load" or keywords.get("weights_only") == "True", path
                if called.endswith("TemporaryDirectory"):  # on Windows a file in it may still be open
                    assert keywords.get("ignore_cleanup_errors") == "True", path


def test_openvino_and_nncf_are_imported_in_one_place() -> None:
    """Imported as usual, both report it to their makers (`runtimes.openvino.load_openvino`)."""
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = {node.module or ""} if isinstance(node, ast.ImportFrom) and not node.level else set()
            named |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            found = {name.partition(".")[0] for name in named} & {"openvino", "nncf", "openvino_telemetry"}
            assert not found, f"{path}:{node.lineno} imports {found}"  # type: ignore[attr-defined]


CATCH_ALLS = {("cli", "_reported"), ("cli", "main"), ("reporting", "optional_output")}
"""Functions that may hold any exception: the last resort, and output beside a result. Both let signals pass."""


def handlers(tree: ast.AST, function: str = "") -> Iterator[tuple[str, ast.ExceptHandler]]:
    """Every handler with the innermost function that it stands in."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.ExceptHandler):
            yield function, child
        inner = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
        yield from handlers(child, inner)


def takes_everything(node: ast.expr | None) -> bool:
    if isinstance(node, ast.Tuple):
        return any(map(takes_everything, node.elts))
    return node is None or ast.unparse(node).rpartition(".")[2] in ("Exception", "BaseException")


def test_signals_and_full_memory_pass_through_every_handler() -> None:
    """A handler of everything begins with `pass_on(error)`, or cleans up and ends with `raise`."""
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function, handler in handlers(tree):
            if not takes_everything(handler.type) or (".".join(dotted(path)), function) in CATCH_ALLS:
                continue
            first, last = handler.body[0], handler.body[-1]
            passes = handler.name is not None and ast.unparse(first) == f"pass_on({handler.name})"
            cleans_up = isinstance(last, ast.Raise) and last.exc is None
            of_exceptions = handler.type is not None and "BaseException" not in ast.unparse(handler.type)
            assert cleans_up or (passes and of_exceptions), f"{path}:{handler.lineno}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
                assert not any(map(takes_everything, node.args)), f"{path}:{node.lineno}"


def test_a_path_of_the_user_is_read_in_one_place() -> None:
    """Settings and flags become paths in config/paths.py; elsewhere a Path is made of a constant or of our own text."""
    for path in modules():
        where = ".".join(dotted(path))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if where != "config.paths":
                assert "expanduser" not in called, f"{path}:{node.lineno}"  # type: ignore[attr-defined]
            if called == "Path" and where.split(".")[0] in ("workflows", "winner", "runs", "console", "views"):
                assert not node.args, f"{path}:{node.lineno}"  # type: ignore[attr-defined]
