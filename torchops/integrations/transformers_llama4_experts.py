"""The experts of Llama 4 in transformers, computed by :func:`torchops.routed_ffn`.

They do not go through the interface of experts: the module around them copies the tokens for each expert, times gates
of which all but a few are 0.
"""

from typing import Any, Dict, List, Tuple

from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

from ..nn._activations import Activation, activation_of
from ..nn.routed_ffn_structure import has_hooks
from ..ops.routed_ffn import routed_ffn

__all__: List[str] = []  # for apply_routed_experts


class RoutedLlama4Moe(Llama4TextMoe):
    """Computes the experts that a token chose, and no others, on gate times token.

    What others have put around the experts (peft, tensor parallelism, accelerate) is called as before.
    """

    activation: Activation

    def forward(self, hidden_states: Tensor) -> Tuple[Tensor, Tensor]:
        experts: Any = self.experts
        if type(experts) is not Llama4TextExperts or has_hooks(experts) or "forward" in vars(experts):
            return super().forward(hidden_states)
        tokens = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(tokens)  # [T, E]
        index = logits.topk(self.top_k, dim=1).indices
        output = routed_ffn(
            tokens,
            index,
            scores.gather(1, index),
            experts.gate_up_proj.mT,
            experts.down_proj.mT,
            activation=self.activation.name,
            alpha=self.activation.alpha,
            glu="concat",
            gate_at="input",
        )
        return self.shared_expert(tokens) + output, logits


def moes_of(model: nn.Module) -> Dict[Any, Any]:
    """Those whose activation is the operator's, with their experts, which peft may have put a layer around."""
    found = {}
    for module in model.modules():
        if type(module) in (Llama4TextMoe, RoutedLlama4Moe):
            experts = next(inside for inside in module.modules() if isinstance(inside, Llama4TextExperts))
            if activation_of(experts.act_fn) is not None:
                found[module] = experts
    return found


def route_(moe: Any, experts: Any) -> None:
    moe.activation = activation_of(experts.act_fn)
    moe.__class__ = RoutedLlama4Moe
