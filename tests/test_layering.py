"""Which way imports run: read from the source, so that a wrong one fails before it makes a circle."""

import ast
import subprocess
import sys
from pathlib import Path

import nemotron_super
import pytest

ROOT = Path(nemotron_super.__file__).parent
PACKAGE = "nemotron_super"
# Each room may import these rooms, and itself. `cli` and `__init__` may import all, and nothing imports them.
ALLOWED = {
    "configuration": set(),
    "kernels_hub": set(),
    "modeling": {"configuration", "kernels_hub"},
    "conversion": {"configuration", "modeling", "kernels_hub"},
    "training": {"configuration", "modeling", "conversion"},
}


def sources():
    """Module name -> source of every module of the package."""
    found = {}
    for room in ALLOWED:
        for path in sorted((ROOT / room).rglob("*.py")):
            # A folder whose name is no identifier is not a package but something that is loaded from its files.
            parts = path.relative_to(ROOT).with_suffix("").parts
            if all(part.isidentifier() for part in parts):
                found[".".join((PACKAGE, *parts)).removesuffix(".__init__")] = path.read_text()
    return found


def package_imports(module, source, is_package=False):
    """Modules of the package that `source` imports, each with whether the import is at the top level."""
    tree = ast.parse(source)
    at_top = {id(node) for node in tree.body}
    for block in tree.body:  # `if TYPE_CHECKING:` and `try:` at the top level count as top level
        if isinstance(block, (ast.If, ast.Try)):
            at_top |= {id(node) for node in ast.walk(block)}
    base = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            anchor = base.split(".")
            anchor = anchor[: len(anchor) - node.level + 1] if node.level else []
            origin = ".".join([*anchor, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == PACKAGE:
                yield name, id(node) in at_top


def violations(module, source, is_package=False):
    room = module.split(".")[1]
    for name, at_top in package_imports(module, source, is_package):
        parts = name.split(".")
        if not at_top:
            yield f"{module} imports {name} inside a function"
        if len(parts) < 2 or parts[1] not in ALLOWED:
            yield f"{module} imports {name}: nothing inside imports the top level"
        elif parts[1] != room and parts[1] not in ALLOWED[room]:
            yield f"{module} imports {name}: {room} may not import {parts[1]}"


def is_package(module):
    return (ROOT.joinpath(*module.split(".")[1:]) / "__init__.py").exists()


def test_every_room_is_known():
    folders = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert folders == set(ALLOWED)


@pytest.mark.parametrize("module", sources())
def test_imports(module):
    assert not list(violations(module, sources()[module], is_package(module)))


def test_no_circles():
    modules = sources()
    graph = {}
    for module, source in modules.items():
        names = [name for name, _ in package_imports(module, source, is_package(module))]
        # `from .cache import check` names an attribute: the module is the longest prefix that exists.
        graph[module] = {n if n in modules else n.rpartition(".")[0] for n in names} & modules.keys()
    done: set[str] = set()
    path: list[str] = []

    def visit(module):
        assert module not in path, f"circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            path.append(module)
            for other in sorted(graph[module]):
                visit(other)
            done.add(path.pop())

    for module in graph:
        visit(module)


@pytest.mark.parametrize("module", sources())
def test_each_module_imports_on_its_own(module):
    assert module in sys.modules or __import__(module)


def test_the_kernels_stand_alone():
    """`kernels_hub` takes tensors: importing the reference must bring in neither transformers nor our models."""
    code = (
        "import importlib.util, sys; sys.modules['nemotron_super'] = module = type(sys)('nemotron_super'); "
        f"module.__path__ = [{str(ROOT)!r}]; import nemotron_super.kernels_hub.reference.ssd_chunk_scan; "
        "found = [m for m in sys.modules if m.startswith(('transformers', 'nemotron_super.'))]; "
        "assert all(m.startswith('nemotron_super.kernels_hub') for m in found), found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_package_is_imported_once():
    """A second copy, under the folder's name, registers every operator again: patches and checks then miss."""
    file = Path(nemotron_super.__file__)
    copies = [n for n, m in sys.modules.items() if getattr(m, "__file__", None) and Path(m.__file__) == file]
    assert copies == [PACKAGE], f"run pytest with --confcutdir=tests; imported as {copies}"


@pytest.mark.parametrize(
    "source, wrong",
    [
        ("from ..kernels_hub.reference import rms_norm", False),
        ("from .norms import NemotronHRMSNorm", False),
        ("import torch", False),
        ("from ..training.packing import PackedWindows", True),
        ("from .. import NemotronHConfig", True),
        ("import nemotron_super", True),
        ("from nemotron_super.conversion import inventory", True),
        ("from ..cli import main", True),
        ("def f():\n    from .norms import NemotronHRMSNorm", True),
        ("class C:\n    def f(self):\n        import nemotron_super.modeling.norms", True),
    ],
)
def test_the_reader_sees_what_is_wrong(source, wrong):
    assert bool(list(violations("nemotron_super.modeling.block", source))) is wrong
