"""Checks of Python that is not run: it parses, its imports exist, and calls fit the signatures."""

from __future__ import annotations

import ast
import importlib
import inspect
from typing import Any

from tests.docs.blocks import Block, PageError


def check_names(block: Block) -> None:
    """Resolve every import of a block, and bind the arguments of every call of an imported name.

    Raises:
        PageError: If a name does not exist or a call does not fit; it names the line.
    """
    try:
        tree = ast.parse(block.code)
    except SyntaxError as error:
        raise PageError(f"{block.where}: {error}") from error
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            known |= _imported(node, block)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = _resolved(node.func, known, block)
            if called is not None:
                _bind(called, node, block)


def _at(block: Block, node: Any) -> str:
    return f"{block.page}:{block.line + node.lineno - 1}"


def _imported(node: ast.Import | ast.ImportFrom, block: Block) -> dict[str, Any]:
    found = {}
    for alias in node.names:
        try:
            if isinstance(node, ast.Import):
                module = importlib.import_module(alias.name)
                top = alias.name.split(".")[0]
                found[alias.asname or top] = module if alias.asname else importlib.import_module(top)
            else:
                found[alias.asname or alias.name] = getattr(importlib.import_module(node.module or ""), alias.name)
        except (ImportError, AttributeError) as error:
            raise PageError(f"{_at(block, node)}: {error}") from error
    return found


def _resolved(node: ast.expr, known: dict[str, Any], block: Block) -> Any:
    """The object of an imported name or of an attribute of one; None if only running would tell it."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _resolved(node.value, known, block)
        if owner is None:
            return None
        if not hasattr(owner, node.attr):
            raise PageError(f"{_at(block, node)}: {ast.unparse(node.value)} has no {node.attr!r}")
        return getattr(owner, node.attr)
    return None


def _bind(called: Any, node: ast.Call, block: Block) -> None:
    if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
        return
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):
        return  # built in, without a signature
    try:
        signature.bind(*node.args, **{keyword.arg: keyword.value for keyword in node.keywords if keyword.arg})
    except TypeError as error:
        raise PageError(f"{_at(block, node)}: {ast.unparse(node.func)}: {error}") from error
