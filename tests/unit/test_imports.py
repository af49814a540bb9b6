"""Who may import whom (the design's section on the tree), and that importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "tesp_api"


def module_of(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def _typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _imports(tree: ast.AST, module: str, *, package: bool, top_only: bool = False) -> Iterator[str]:
    """What a module imports, also inside functions unless `top_only`; full names, `from x import y` as x.y if that is
    one of our modules."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if top_only and (_typing_only(node) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            continue
        todo.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")
                above = above[: len(above) - node.level + (1 if package else 0)]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in FILES else base


def imports(module: str, *, top_only: bool = False) -> set[str]:
    file = FILES[module]
    tree = ast.parse(file.read_text())
    return set(_imports(tree, module, package=file.name == "__init__.py", top_only=top_only))


def ours(module: str) -> set[str]:
    return {name for name in imports(module) if name == "tesp_api" or name.startswith("tesp_api.")}


def below(prefix: str) -> list[str]:
    return [module for module in FILES if module == prefix or module.startswith(prefix + ".")]


PROTOCOLS = {
    "tesp_api.errors",
    "tesp_api.tes",
    "tesp_api.task",
    "tesp_api.lifecycle",
    "tesp_api.parameters",
    "tesp_api.store",
    "tesp_api.store.mailbox",
    "tesp_api.sites",
    "tesp_api.runner.job",
    "tesp_api.relay",
    "tesp_api.record",
    "tesp_api.sites.documents",
    "tesp_api",
}


def test_the_core_looks_down_only() -> None:
    assert ours("tesp_api") == set()
    assert ours("tesp_api.errors") == set()
    assert ours("tesp_api.tes") <= {"tesp_api.errors"}
    assert ours("tesp_api.parameters") <= {"tesp_api.tes", "tesp_api.errors"}
    assert ours("tesp_api.task") <= {"tesp_api.tes", "tesp_api.errors", "tesp_api.runner", "tesp_api.runner.job"}
    assert ours("tesp_api.lifecycle") <= PROTOCOLS - {"tesp_api.store", "tesp_api.store.mailbox", "tesp_api.sites"} | {
        "tesp_api.runner"
    }


@pytest.mark.parametrize("module", below("tesp_api.runner"))
def test_the_runner_imports_only_itself_and_the_standard_library(module: str) -> None:
    for name in imports(module):
        if name.startswith("tesp_api"):
            assert name == "tesp_api" or name.startswith("tesp_api.runner"), (module, name)
        else:
            assert name.split(".")[0] in {*sys.stdlib_module_names, "_sha2", "_sha256"}, (module, name)


@pytest.mark.parametrize(
    ("part", "own"),
    [
        ("tesp_api.store", {"tesp_api.store.codec"}),
        ("tesp_api.sites", {"tesp_api.sites", "tesp_api.runner"}),
        ("tesp_api.dispatch", {"tesp_api.dispatch"}),
        ("tesp_api.api", {"tesp_api.api"}),
        ("tesp_api.storage", {"tesp_api.storage"}),
    ],
)
def test_parts_see_protocols_only(part: str, own: set[str]) -> None:
    for module in below(part):
        for name in ours(module):
            allowed = name in PROTOCOLS or any(name == each or name.startswith(each + ".") for each in own)
            assert allowed, f"{module} imports {name}"


def test_the_seams_know_no_implementation() -> None:
    seams = {"tesp_api.store", "tesp_api.sites", "tesp_api.record", "tesp_api.sites.documents"}
    assert ours("tesp_api.store") <= PROTOCOLS - seams
    assert ours("tesp_api.sites") <= PROTOCOLS - seams


ROOTS = {"tesp_api.app", "tesp_api.tesp_api", "tesp_api.settings", "tesp_api.cli.serve", "tesp_api.cli.migrate"}
"""What may know the settings; of these only app knows concrete classes."""


def test_only_the_roots_know_settings_and_concrete_classes() -> None:
    concrete = {
        *(set(below("tesp_api.store")) - {"tesp_api.store", "tesp_api.store.codec", "tesp_api.store.mailbox"}),
        *(set(below("tesp_api.sites")) - {"tesp_api.sites", "tesp_api.sites.documents"}),
    }
    for module in FILES:
        found = ours(module)
        if module not in ROOTS:
            assert "tesp_api.settings" not in found, module
            assert "tesp_api.app" not in found, module
        if module != "tesp_api.app" and not module.startswith(("tesp_api.sites.", "tesp_api.store.")):
            assert not found & concrete, module


@pytest.mark.parametrize(
    ("library", "home"), [("motor", "store.mongo"), ("jose", "api.auth"), ("sqlite3", "store.sqlite")]
)
def test_libraries_that_have_one_home(library: str, home: str) -> None:
    users = {module for module in FILES if any(name.split(".")[0] == library for name in imports(module))}
    assert users <= {f"tesp_api.{home}"}


def test_there_are_no_cycles() -> None:
    graph = {module: imports(module, top_only=True) & set(FILES) - {module} for module in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for each in sorted(graph[module]):
                visit(each, (*path, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


IMPORT_ALL = """
import importlib, os, sys, threading
before = set(os.listdir("."))
descriptors = len(os.listdir("/proc/self/fd"))
for name in sys.argv[1:]:
    importlib.import_module(name)
assert threading.active_count() == 1, threading.enumerate()
assert set(os.listdir(".")) == before, os.listdir(".")
assert len(os.listdir("/proc/self/fd")) <= descriptors, "open files"
for name, module in list(sys.modules.items()):
    if name.startswith("tesp_api"):
        import asyncio
        for value in vars(module).values():
            assert not isinstance(value, asyncio.AbstractEventLoop), name
"""


def test_importing_does_nothing(tmp_path: Path) -> None:
    modules = [name for name in FILES if name not in ("tesp_api.tesp_api",) and not name.endswith(".__main__")]
    found = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT_ALL, *modules],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/nowhere", "TESP_SERVER__PORT": "no number", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_what_only_some_use_is_loaded_by_them_alone(tmp_path: Path) -> None:
    """A service without MongoDB and brokers starts a quarter sooner."""
    script = "import sys, tesp_api.app; print(*{'motor', 'pymongo', 'aio_pika', 'aiormq'} & set(sys.modules))"
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (found.returncode, found.stdout.strip(), found.stderr) == (0, "", "")
