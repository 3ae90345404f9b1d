"""The two halves of an encoder layer of transformers, attention and MLP, each with its residual, as functions.

Tokens merge between the two, where a layer has no seam. Layers of different models name and nest their parts
differently (norms, scales, dropouts, stochastic depth), and all write them down as statements one after the other. So
the ``forward`` of a class is cut behind the sum with the first residual, and what is executed are its own statements.
"""

import ast
import inspect
import textwrap
from functools import cache
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Set, Union

from ._attention_layers import names, source_of_forward


class Halves(NamedTuple):
    attention: Callable[..., Any]  # (layer, tokens, attention_mask, **kwargs) -> tokens
    mlp: Callable[..., Any]  # (layer, tokens) -> tokens


@cache
def halves(layer: Any, attention: str) -> Union[Halves, str]:
    """Of a class of layers whose attention is its part of this name. A string is the reason why it cannot be cut, as
    the end of a sentence that begins with the class."""
    source = source_of_forward(layer)
    if not source:
        return "has a forward without a source"
    forward: Any = ast.parse(textwrap.dedent(source)).body[0]
    arguments = forward.args
    given = [argument.arg for argument in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
    if len(given) != 3 or given[2] != "attention_mask" or arguments.kwarg is None:
        return f"is given {', '.join(given[1:])}, and not tokens and an attention_mask only"
    tokens = given[1]

    body = forward.body[1:] if ast.get_docstring(forward) is not None else forward.body
    calls = [index for index, statement in enumerate(body) if calls_of(statement, attention)]
    if len(calls) != 1 or not hands_on_mask_only(body, calls[0], attention):
        return f"does not give {attention} tokens and a mask, once and nothing besides"
    cut = next((index for index in range(calls[0], len(body)) if is_sum(body[index])), None)
    if cut is None or not any("self." in ast.unparse(statement) for statement in body[cut + 1 :]):
        return f"does not add what {attention} returns to a residual, in a statement of its own"
    first, second, name = body[: cut + 1], body[cut + 1 :], body[cut].targets[0].id
    known = {*stored(first), *given, arguments.kwarg.arg} - {"self", name}
    if used(second) & known or not ends_with_return(first, second):
        return "computes its MLP from more than the sum of attention and residual, or more than its output"

    function = inspect.unwrap(layer.forward)
    if function.__code__.co_freevars:
        return "has a forward that is a closure"
    return Halves(
        compiled(f"def attention_half(self, {tokens}, attention_mask, **{arguments.kwarg.arg}): ...", first, function),
        compiled(f"def mlp_half(self, {name}): ...", second, function),
    )


def calls_of(tree: ast.AST, part: str) -> List[ast.Call]:
    """Calls of self.part."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{part}"]


def hands_on_mask_only(body: List[ast.stmt], index: int, attention: str) -> bool:
    """Not in a branch or a loop; and the mask is for nothing else."""
    calls = calls_of(body[index], attention)
    if not isinstance(body[index], ast.Assign) or len(calls) != 1:
        return False
    keywords = {keyword.arg for keyword in calls[0].keywords}
    given = [*calls[0].args, *(keyword.value for keyword in calls[0].keywords)]
    masks = sum(names(argument) == ["attention_mask"] for argument in given)
    uses = sum(names(statement).count("attention_mask") for statement in body)
    return keywords <= {None, "hidden_states", "attention_mask"} and len(calls[0].args) <= 2 and masks == uses == 1


def is_sum(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Assign)
        and len(statement.targets) == 1
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.BinOp)
        and isinstance(statement.value.op, ast.Add)
    )


def stored(statements: Iterable[ast.stmt]) -> Set[str]:
    nodes = (node for statement in statements for node in ast.walk(statement))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def used(statements: Iterable[ast.stmt]) -> Set[str]:
    """Names that are read before an assignment that always happens."""
    found: Set[str] = set()
    assigned: Set[str] = set()
    for statement in statements:
        reads = {
            node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        }
        found |= reads - assigned
        if isinstance(statement, ast.Assign):
            assigned |= stored([statement])
    return found


def ends_with_return(first: List[ast.stmt], second: List[ast.stmt]) -> bool:
    """Of one value, and nowhere else."""
    returns = [node for statement in first + second for node in ast.walk(statement) if isinstance(node, ast.Return)]
    return bool(second) and returns == second[-1:] and not isinstance(returns[0].value, (ast.Tuple, type(None)))


def compiled(head: str, body: List[ast.stmt], original: Any) -> Callable[..., Any]:
    """A function with these statements of another one, its globals and its lines."""
    definition: Any = ast.parse(head).body[0]
    last = body[-1]
    returned = [] if isinstance(last, ast.Return) else [ast.Return(ast.Name(last.targets[0].id, ast.Load()))]  # type: ignore[attr-defined]
    definition.body = [*body, *returned]
    module = ast.fix_missing_locations(ast.Module([definition], type_ignores=[]))
    ast.increment_lineno(module, original.__code__.co_firstlineno - 1)
    namespace: Dict[str, Any] = {}
    exec(compile(module, original.__code__.co_filename, "exec"), original.__globals__, namespace)
    return namespace[definition.name]
