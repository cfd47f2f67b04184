"""The rules of the code base, checked on its syntax trees: who may import whom, and how long things may grow."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MLX_BACKEND, CUDA_BACKEND = "mlx_diffgemma.mlx_backend", "cuda_backend"
FRAMEWORKS = {"mlx", "torch", "triton", "transformers"}
IMPORT_BY_NAME = {"mlx_diffgemma.backend", "mlx_diffgemma.__main__"}  # a backend; a command
CATCHES_ALL = {"mlx_diffgemma.prompts.tokenizer": 1}  # the tokenizers package raises bare Exception
LONGEST_FILE, LONGEST_FUNCTION = 400, 60

Rule = Callable[[str, ast.Module, str], Iterator[str]]


def sources() -> dict[str, str]:
    """Module name -> text of every file of the wheel."""
    found = {}
    for package in ("mlx_diffgemma", CUDA_BACKEND, "convert"):
        for path in sorted((ROOT / package).rglob("*.py")):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path.read_text(encoding="utf-8")
    return found


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def core(module: str) -> bool:
    return within(module, "mlx_diffgemma") and not within(module, MLX_BACKEND)


def imports(module: str, nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Absolute names of what ``nodes`` import; ``from a import b`` gives both ``a`` and ``a.b``."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.removesuffix(".__init__").split(".")
            up = node.level - (1 if module.endswith(".__init__") else 0)
            start = package[: len(package) - up] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not inside functions, nor ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from at_import(node)


def core_loads_no_framework(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    if core(module):
        yield from (name for name in imports(module, at_import(tree)) if name.split(".")[0] in FRAMEWORKS)


def core_knows_no_backend(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    if core(module):
        for name in imports(module, ast.walk(tree)):
            yield from (name for other in (MLX_BACKEND, CUDA_BACKEND, "convert") if within(name, other))


def backends_are_strangers(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    for one, other, framework in ((MLX_BACKEND, CUDA_BACKEND, "torch"), (CUDA_BACKEND, MLX_BACKEND, "mlx")):
        if within(module, one):
            names = imports(module, ast.walk(tree))
            yield from (name for name in names if any(within(name, far) for far in (other, framework, "convert")))


def convert_is_numpy_only(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    if within(module, "convert"):
        for name in imports(module, ast.walk(tree)):
            if name.split(".")[0] in FRAMEWORKS or within(name, MLX_BACKEND) or within(name, CUDA_BACKEND):
                yield name


def dynamic_imports_have_their_place(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    if module in IMPORT_BY_NAME:
        return
    yield from (name for name in imports(module, ast.walk(tree)) if within(name, "importlib"))
    yield from (node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "__import__")


def files_are_short(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    if len(text.splitlines()) > LONGEST_FILE:
        yield f"{len(text.splitlines())} lines"


def functions_are_short(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.body[0].lineno + 2  # parameters, one a line in a kernel, are no statements
            if lines > LONGEST_FUNCTION:
                yield f"{node.name}: {lines} lines"


def errors_are_named(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = {leaf.id for leaf in ast.walk(node.type) if isinstance(leaf, ast.Name)} if node.type else {""}
            if caught & {"", "Exception", "BaseException"}:
                lines.append(f"line {node.lineno}")
    yield from lines[CATCHES_ALL.get(module, 0) :]


def nothing_is_put_off(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    yield from (match[0] for match in re.finditer(r"\b(TODO|FIXME|XXX)\b", text))


RULES: list[Rule] = [
    core_loads_no_framework,
    core_knows_no_backend,
    backends_are_strangers,
    convert_is_numpy_only,
    dynamic_imports_have_their_place,
    files_are_short,
    functions_are_short,
    errors_are_named,
    nothing_is_put_off,
]

BROKEN = [
    (core_loads_no_framework, "mlx_diffgemma.api", "try:\n    import torch.nn\nfinally:\n    pass"),
    (core_loads_no_framework, "mlx_diffgemma.api", "class A:\n    from mlx import core"),
    (core_knows_no_backend, "mlx_diffgemma.formats.hf", "def f():\n    from ..mlx_backend import model"),
    (core_knows_no_backend, "mlx_diffgemma.sampling.__init__", "from .. import mlx_backend"),
    (core_knows_no_backend, "mlx_diffgemma.api", "import convert.show"),
    (backends_are_strangers, "cuda_backend.model", "from mlx_diffgemma.mlx_backend import model"),
    (backends_are_strangers, "mlx_diffgemma.mlx_backend.model", "def f():\n    import torch"),
    (convert_is_numpy_only, "convert.show", "def f():\n    import mlx.core as mx"),
    (dynamic_imports_have_their_place, "mlx_diffgemma.hub", "from importlib import import_module"),
    (dynamic_imports_have_their_place, "mlx_diffgemma.hub", "__import__('torch')"),
    (files_are_short, "convert.show", "x = 1\n" * 401),
    (functions_are_short, "convert.show", "def f():\n" + "    x = 1\n" * 60),
    (errors_are_named, "convert.show", "try:\n    f()\nexcept:\n    pass"),
    (errors_are_named, "convert.show", "try:\n    f()\nexcept (KeyError, Exception):\n    pass"),
    (nothing_is_put_off, "convert.show", "x = 1  # TO" + "DO later"),
]
FINE = [
    (core_loads_no_framework, "mlx_diffgemma.tools.parity", "def f():\n    import torch"),
    (core_loads_no_framework, "mlx_diffgemma.tools.parity", "if TYPE_CHECKING:\n    import torch"),
    (core_loads_no_framework, "mlx_diffgemma.mlx_backend.model", "import mlx.core as mx"),
    (dynamic_imports_have_their_place, "mlx_diffgemma.backend", "import importlib"),
    (functions_are_short, "convert.show", "def f():\n" + "    x = 1\n" * 59),
    (errors_are_named, "convert.show", "try:\n    f()\nexcept ValueError:\n    pass"),
]


def offences(rule: Rule, module: str, text: str) -> list[str]:
    return [f"{module}: {what}" for what in rule(module, ast.parse(text), text)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps(rule: Rule):
    found = sources()
    assert found["mlx_diffgemma.backend"]
    assert [line for module, text in found.items() for line in offences(rule, module, text)] == []


@pytest.mark.parametrize(("rule", "module", "text"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_rule_can_fail(rule: Rule, module: str, text: str):
    assert offences(rule, module, text)


@pytest.mark.parametrize(("rule", "module", "text"), FINE, ids=lambda value: getattr(value, "__name__", None))
def test_a_rule_is_not_too_strict(rule: Rule, module: str, text: str):
    assert not offences(rule, module, text)
