"""Whether an attention layer of transformers makes the mask of its attention, or passes on the one it was given."""

import ast
import inspect
import textwrap
from functools import cache
from typing import Iterator, List, Tuple


@cache
def makes_its_mask(attention: type) -> bool:
    """Whether a class calls an attention implementation with a mask that it computes: chosen keys, position biases.

    Read from its source: before a model runs nothing else tells, and a span cannot follow what is computed.
    """
    try:
        source = inspect.getsource(inspect.unwrap(attention.forward))  # type: ignore[attr-defined]
    except (AttributeError, OSError, TypeError):
        return False
    if "ALL_ATTENTION_FUNCTIONS" not in source:
        return False
    forward = ast.parse(textwrap.dedent(source))
    assignments = [(names(target), value) for target, value in assigned(forward)]
    implementations = {
        name for found, value in assignments if "ALL_ATTENTION_FUNCTIONS" in names(value) for name in found
    }
    calls = [
        call for call in ast.walk(forward) if isinstance(call, ast.Call) and implementations & set(names(call.func))
    ]
    masks = {name for call in calls for mask in mask_arguments(call) for name in names(mask)}
    return any(computes(value) for found, value in assignments if masks & set(found))


def assigned(tree: ast.AST) -> Iterator[Tuple[ast.AST, ast.AST]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            yield from ((target, node.value) for target in node.targets)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield node.target, node.value


def names(tree: ast.AST) -> List[str]:
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]


def mask_arguments(call: ast.Call) -> List[ast.expr]:
    """Of implementation(module, query, key, value, attention_mask, ...)."""
    return call.args[4:5] + [keyword.value for keyword in call.keywords if keyword.arg == "attention_mask"]


def computes(value: ast.AST) -> bool:
    """Rather than choosing among masks that there are, by a condition or from a dictionary."""
    return any(
        isinstance(node, (ast.BinOp, ast.Invert))
        or (isinstance(node, ast.Call) and not (isinstance(node.func, ast.Attribute) and node.func.attr == "get"))
        for node in ast.walk(value)
    )
