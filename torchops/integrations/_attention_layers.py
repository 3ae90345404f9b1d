"""What layers of transformers do with attention and its mask, read from their source.

Before a model runs nothing else tells, and a span cannot follow what is computed.
"""

import ast
import inspect
import textwrap
from functools import cache
from typing import Any, Iterable, Iterator, List, Optional, Tuple

BIASES = ("position_bias", "relative_position_bias")


@cache
def source_of_forward(layer: Any) -> str:
    """Empty where there is none."""
    try:
        return inspect.getsource(inspect.unwrap(layer.forward))
    except (AttributeError, OSError, TypeError):
        return ""


def takes_implementations(layer: Any) -> bool:
    """Whether it calls the attention implementation that the model is switched to."""
    return "ALL_ATTENTION_FUNCTIONS" in source_of_forward(layer)


@cache
def own_mask(layer: Any) -> Optional[str]:
    """What a class does that leaves no span to follow, as the end of a sentence that begins with its name; None if
    it passes on the mask that it was given."""
    source = source_of_forward(layer)
    if "mask" not in source:
        return None
    forward = ast.parse(textwrap.dedent(source))
    assignments = [(names(target), value) for target, value in assigned(forward)]
    if not takes_implementations(layer):
        if any(reduces_rows(node) for node in ast.walk(forward)):
            return "computes with the mask of attention itself"
        if any("attention_mask" in name and hides(value) for found, value in assignments for name in found):
            return "makes the mask of attention itself"
        return None
    calls = list(calls_of_implementations(forward))
    if hands_over(calls, BIASES):
        return "adds position biases to the scores of its attention"
    masks = {name for call in calls for mask in mask_arguments(call) for name in names(mask)}
    if any(computes(value) for found, value in assignments if masks & set(found)):
        return "makes the mask of its attention itself"
    return None


@cache
def passes(layer: Any, arguments: Tuple[str, ...]) -> bool:
    """Whether it calls the attention implementation with one of these arguments."""
    if not takes_implementations(layer):
        return False
    forward = ast.parse(textwrap.dedent(source_of_forward(layer)))
    return hands_over(calls_of_implementations(forward), arguments)


def hands_over(calls: Iterable[ast.Call], arguments: Tuple[str, ...]) -> bool:
    return any(keyword.arg in arguments and names(keyword.value) for call in calls for keyword in call.keywords)


def calls_of_implementations(forward: ast.AST) -> Iterator[ast.Call]:
    implementations = {
        name
        for target, value in assigned(forward)
        if "ALL_ATTENTION_FUNCTIONS" in names(value)
        for name in names(target)
    }
    for node in ast.walk(forward):
        if isinstance(node, ast.Call) and implementations & set(names(node.func)):
            yield node


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


def reduces_rows(node: ast.AST) -> bool:
    """torch.all(attention_mask ..., dim=2): queries that see nothing, of a mask of queries times keys."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "all"
        and "attention_mask" in names(node)
        and any(word.arg == "dim" and ast.unparse(word.value) in ("2", "-1") for word in node.keywords)
    )


def hides(value: ast.AST) -> bool:
    """(1 - mask) * torch.finfo(dtype).min: numbers that are added to scores. Or a function that makes such ones."""
    if isinstance(value, ast.Call) and ast.unparse(value.func).startswith("generate_"):
        return True
    return isinstance(value, ast.BinOp) and any(
        isinstance(node, ast.Attribute) and node.attr == "min" and "finfo" in ast.unparse(node.value)
        for node in ast.walk(value)
    )
