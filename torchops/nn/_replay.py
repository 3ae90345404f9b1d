"""Runs of a model, or of its blocks alone, while its layers are replaced one after the other."""

from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Callable, Dict, Iterator, List, Optional, Set

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ._calibration import current_padding, first_argument, observed, tokens_of
from ._conversion import put_
from ._plan import Call, Plan, Stage
from .stf_calibration import Moments

__all__: List[str] = []  # for factorize_ alone


class _SeenAllError(Exception):
    """Ends the run of a block."""


class Replay:
    """What layers get and should return, in a model some of whose layers are replaced.

    Only while something runs does the model have the new layers: an error leaves it as it was. A block's inputs come
    from a run of the whole model, or, where it goes on with what the block before returned, from a run of that block
    alone. Those of the model as it was and of the model with new layers are held for one block at a time.

    Args:
        model, layers: with the names of each layer.
        run: lets the model compute, the same each time that it is called.
        in_sequence: whether layers get the inputs that they have in the model with new layers, or those of the model
            as it was.
    """

    def __init__(
        self, model: nn.Module, layers: Dict[nn.Module, List[str]], run: Callable[[], Any], in_sequence: bool
    ) -> None:
        self.plan = Plan(model, layers, run)
        self._model, self._names, self._run, self._in_sequence = model, layers, run, in_sequence
        self._new: Dict[nn.Module, nn.Module] = {}
        self._block: Optional[nn.Module] = None
        self._dense_calls: List[Call] = []
        self._calls: List[Call] = []

    def use(self, layer: nn.Module, instead: nn.Module) -> None:
        """From here on the model has another layer in the place of this one."""
        self._new[layer] = instead

    def moments(self, stage: Stage) -> Moments:
        """Of the inputs of the layers as they are now, and of what the layers returned in the model as it was."""
        self._go_to(stage.block)
        changed = self._in_sequence and bool(self._new)
        moments = self._moments(stage, changed)
        # Some layers only get what others send them: as they are now, maybe nothing.
        return moments if moments.count or not changed else self._moments(stage, False)

    def _moments(self, stage: Stage, changed: bool) -> Moments:
        moments = Moments()
        calls: List[Any] = (
            [(None, None)] if stage.block is None else list(zip(self._dense_calls, self._calls, strict=True))
        )
        for dense_call, call in calls:
            if not changed:
                for rows in self._inputs(stage, dense_call, False):
                    moments.add(rows)
                continue
            outputs, inputs = self._outputs(stage, dense_call), self._inputs(stage, call, True)
            shapes = [len(rows) for rows in inputs]
            paired = all([len(rows) for rows in outputs[layer]] == shapes for layer in stage.layers)
            for place, rows in enumerate(inputs):
                moments.add(rows, {layer: outputs[layer][place] for layer in stage.layers} if paired else None)
        return moments

    def _inputs(self, stage: Stage, call: Optional[Call], changed: bool) -> List[Tensor]:
        """What the stage's layers get in one run, time after time."""
        inputs: List[Tensor] = []

        def take(layer: nn.Module, input: Tensor, output: Tensor) -> None:
            if layer is stage.layers[0]:
                inputs.append(tokens_of(input, current_padding()))

        self._watch(stage, call, changed, take)
        return inputs

    def _outputs(self, stage: Stage, call: Optional[Call]) -> Dict[nn.Module, List[Tensor]]:
        """What each of the stage's layers returns in one run of the model as it was."""
        outputs: Dict[nn.Module, List[Tensor]] = defaultdict(list)

        def take(layer: nn.Module, input: Tensor, output: Tensor) -> None:
            outputs[layer].append(tokens_of(output, current_padding()))

        self._watch(stage, call, False, take)
        return outputs

    def _watch(
        self,
        stage: Stage,
        call: Optional[Call],
        changed: bool,
        take: Callable[[nn.Module, Tensor, Tensor], None],
    ) -> None:
        """Runs a block, or the model where there is no call, and hands over what the stage's layers get and return. The
        model may write to that afterwards."""
        seen: Set[nn.Module] = set()
        ends = call is not None and self.plan.is_called_once(stage)

        def look(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            take(layer, first_argument(args, kwargs), output)
            seen.add(layer)
            if ends and len(seen) == len(stage.layers):
                raise _SeenAllError

        # Before hooks that change what the layer returned.
        hooks = [layer.register_forward_hook(look, with_kwargs=True, prepend=True) for layer in stage.layers]
        try:
            with self._having(changed), suppress(_SeenAllError):
                if call is None:
                    self._run()
                else:
                    assert stage.block is not None
                    call.run(stage.block)
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _having(self, changed: bool) -> Iterator[None]:
        """The model with its new layers, or as it was."""
        places = [(new, layer, name) for layer, new in self._new.items() for name in self._names[layer]]
        with observed(self._model):
            try:
                for new, _, name in places if changed else ():
                    put_(self._model, name, new)
                yield
            finally:
                for _, layer, name in places:
                    put_(self._model, name, layer)

    # ---- inputs of blocks -----------------------------------------------------------------------

    def _go_to(self, block: Optional[nn.Module]) -> None:
        if block is None or block is self._block:
            return
        follows = block in self.plan.flows and self.plan.flows[block].source is self._block
        inputs_of = self._inputs_after if follows else self._inputs_in_model
        dense_calls = self.plan.first_calls if block is self.plan.first_block else inputs_of(block, False)
        self._calls = inputs_of(block, True) if self._in_sequence and self._new else dense_calls
        self._block, self._dense_calls = block, dense_calls
        if len(self._calls) != len(dense_calls):
            raise ValueError(
                "factorize_: expected calibration to compute the same each time it is called, got"
                f" {len(dense_calls)} calls of a block, and then {len(self._calls)}"
            )

    def _inputs_after(self, block: nn.Module, changed: bool) -> List[Call]:
        flow = self.plan.flows[block]
        calls = []
        for call in self._calls if changed else self._dense_calls:
            with self._having(changed):
                output = tree_flatten(call.run(flow.source))[0][flow.result]
            arguments = [output if at == flow.argument else value for at, value in enumerate(call.arguments)]
            calls.append(replace(call, arguments=arguments))
        return calls

    def _inputs_in_model(self, block: nn.Module, changed: bool) -> List[Call]:
        calls: List[Call] = []

        def take(_: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append(Call.of(args, kwargs))

        hook = block.register_forward_pre_hook(take, with_kwargs=True, prepend=True)
        try:
            with self._having(changed):
                self._run()
        finally:
            hook.remove()
        return calls
