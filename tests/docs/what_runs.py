"""Which tests of a file `make test` runs, read from the file's text.

It runs those that are not marked `long` or `interop`. A mark may stand before a test, before its
class, in a `pytestmark`, or on each of its parameters.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

_LEFT_OUT = re.compile(r"\b(long|LONG|interop)\b")
_Test = ast.FunctionDef | ast.AsyncFunctionDef


def running_tests(file: Path) -> set[str]:
    """Return the names of a file's tests that `make test` runs, and of their classes."""
    module = ast.parse(file.read_text())
    values = dict(_assignments(module.body))
    return set(_running(module.body, values))


def _running(body: list[ast.stmt], values: dict[str, ast.expr]) -> Iterator[str]:
    if any(
        name == "pytestmark" and _is_left_out(value, values) for name, value in _assignments(body)
    ):
        return
    for node in body:
        if not isinstance(node, ast.ClassDef | _Test):
            continue
        if any(_leaves_out(decorator, values) for decorator in node.decorator_list):
            continue
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            inside = set(_running(node.body, values))
            yield from inside | ({node.name} if inside else set())
        elif isinstance(node, _Test) and node.name.startswith("test_"):
            yield node.name


def _assignments(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for node in body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, node.value


def _leaves_out(decorator: ast.expr, values: dict[str, ast.expr]) -> bool:
    """Tell whether a decorator leaves its test out: as a mark, or by marking each parameter."""
    if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("parametrize"):
        return len(decorator.args) > 1 and not _any_runs(decorator.args[1], values)
    return _is_left_out(decorator, values)


def _any_runs(parameters: ast.expr, values: dict[str, ast.expr]) -> bool:
    match parameters:
        case ast.List() | ast.Tuple():
            return any(_runs(one, values) for one in parameters.elts)
        case ast.ListComp() | ast.GeneratorExp():
            return _runs(parameters.elt, values)
        case ast.BinOp():
            return _any_runs(parameters.left, values) or _any_runs(parameters.right, values)
        case ast.Name() if parameters.id in values:
            return _any_runs(values[parameters.id], values)
    return True


def _runs(parameter: ast.expr, values: dict[str, ast.expr]) -> bool:
    match parameter:
        case ast.Starred():
            return _any_runs(parameter.value, values)
        case ast.Name():
            return not _LEFT_OUT.search(parameter.id)
        case ast.Call():
            marks = [keyword.value for keyword in parameter.keywords if keyword.arg == "marks"]
            return not any(_is_left_out(mark, values) for mark in marks)
    return True


def _is_left_out(mark: ast.expr, values: dict[str, ast.expr]) -> bool:
    if isinstance(mark, ast.Name):
        mark = values.get(mark.id, mark)
    # With a condition some are left out, and others are not.
    return not isinstance(mark, ast.IfExp) and bool(_LEFT_OUT.search(ast.unparse(mark)))
