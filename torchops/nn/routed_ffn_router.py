"""Which blocks of a routed layer, or which experts, compute a token."""

from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor, nn

from ._losses import sum_of_losses

__all__ = ["Router", "balance_loss"]

SCORES = ("sigmoid", "softmax", "softmax_topk")


class Router(nn.Module):
    """Chooses for each token the k blocks, or experts, of the largest scores, and says how much each one counts.

    Scores are a linear function of the token. They, the choice and the gates are computed in float32 whatever the dtype
    of the model, under autocast, too. Of equal scores the lower block comes first.

    ==============  ==================================  ===============================================
    score           blocks are chosen by                gates
    ==============  ==================================  ===============================================
    "sigmoid"       the sigmoid plus ``balance_bias``   the sigmoid (DeepSeek-V3)
    "softmax"       the softmax of all                  that softmax (Mixtral and others)
    "softmax_topk"  the score itself                    the softmax of the chosen ones' scores (GPT-OSS)
    ==============  ==================================  ===============================================

    Two things keep blocks equally busy. ``balance_loss``, which :func:`balance_loss` collects and the caller adds to
    the loss, is G sum over blocks of f P, where f is the share of all choices of this pass that are block g, and P the
    mean over tokens of its probability: of the softmax, or of the sigmoids divided by their sum. It is 1 where all are
    chosen equally often. The other one needs no gradient: :meth:`update_balance`.

    Args:
        dim: d, features of a token.
        num_blocks: the number of blocks, G.
        top_k: how many blocks compute a token, k.
        score: see above.
        renormalize: divide a token's gates by their sum.
        straight_through: gates are 1, and their gradients those of the gates' logarithms, so that a token is the plain
            sum of its blocks' results: what a layer cut out of a dense one computes.
        bias: of the linear function.
        device, dtype: of the parameters.

    Attributes:
        balance_loss: of the last forward pass in training, a number with a gradient. None in evaluation.
        chosen: int64 [..., k], the blocks of that pass.
        balance_bias: a buffer [G] in float32, also in models of other dtypes, where ``score`` is "sigmoid".

    Shapes: forward(input [..., d]) returns index int64 [..., k], by falling score, and gates [..., k] in float32
    (float64 for float64).

    Raises:
        ValueError: an unknown score, or k outside of 1..G.

    Source: Switch Transformers (Fedus et al., 2021) for the loss.

    >>> router = torchops.nn.Router(64, 8, top_k=2, score="softmax", renormalize=True)
    >>> index, gates = router(torch.randn(2, 10, 64))
    >>> index.shape, gates.sum(-1).allclose(torch.ones(2, 10))
    (torch.Size([2, 10, 2]), True)
    """

    bias: Optional[Tensor]
    balance_bias: Optional[Tensor]
    balance_loss: Optional[Tensor]
    chosen: Optional[Tensor]

    def __init__(
        self,
        dim: int,
        num_blocks: int,
        top_k: int = 2,
        score: str = "sigmoid",
        *,
        renormalize: bool = False,
        straight_through: bool = False,
        bias: bool = False,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        if score not in SCORES:
            raise ValueError(f"Router: expected score to be one of {', '.join(SCORES)}, got {score!r}")
        if not 1 <= top_k <= num_blocks:
            raise ValueError(f"Router: expected top_k in 1..num_blocks = {num_blocks}, got {top_k}")
        self.num_blocks = num_blocks
        self.top_k = top_k
        self.score = score
        self.renormalize = renormalize
        self.straight_through = straight_through
        self.weight = nn.Parameter(torch.empty(num_blocks, dim, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(num_blocks, device=device, dtype=dtype)) if bias else None
        )
        counted = score == "sigmoid"
        self.register_buffer(
            "balance_bias", torch.zeros(num_blocks, device=device, dtype=torch.float32) if counted else None
        )
        self.balance_loss = None
        self.chosen = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        for tensor in (self.bias, self.balance_bias):
            if tensor is not None:
                nn.init.zeros_(tensor)

    def forward(self, input: Tensor) -> Tuple[Tensor, Tensor]:
        scores = self.scores(input)
        choice = scores
        # Of a far lower score than another's nothing would be left but its logarithm.
        logs = scores.log_softmax(-1)
        if self.score == "sigmoid":
            logs, choice = nn.functional.logsigmoid(scores), scores.sigmoid()
            balance_bias = self.balance_bias
            if balance_bias is not None:
                choice = choice + balance_bias
        # topk does not say which of equal ones it takes.
        index = torch.sort(choice.detach(), stable=True, dim=-1, descending=True)[1][..., : self.top_k]
        log_gates = logs.gather(-1, index)
        if self.renormalize or self.score == "softmax_topk":
            log_gates = log_gates.log_softmax(-1)
        gates = 1.0 + (log_gates - log_gates.detach()) if self.straight_through else log_gates.exp()
        self.balance_loss = None
        self.chosen = None
        if self.training:
            self.balance_loss = self.imbalance(logs.softmax(-1), index)
            self.chosen = index
        return index, gates

    def scores(self, input: Tensor) -> Tensor:
        """[..., d] -> [..., G], before any sigmoid or softmax."""
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        bias = self.bias
        if torch.jit.is_scripting():
            # Autocast cannot be switched off there, but it leaves float64 alone.
            wide_bias = None if bias is None else bias.double()
            return nn.functional.linear(input.double(), self.weight.double(), wide_bias).to(dtype)
        with torch.autocast(input.device.type, enabled=False):
            wide_bias = None if bias is None else bias.to(dtype)
            return nn.functional.linear(input.to(dtype), self.weight.to(dtype), wide_bias)

    def imbalance(self, probabilities: Tensor, index: Tensor) -> Tensor:
        """The balance loss of probabilities [..., G] that add up to 1, and index [..., k]."""
        probabilities = probabilities.flatten(0, -2)
        chosen = torch.zeros_like(probabilities).scatter(-1, index.flatten(0, -2), 1.0)
        tokens = max(probabilities.shape[0], 1)
        shares = chosen.sum(0) / (tokens * self.top_k)
        return self.num_blocks * (shares * probabilities.sum(0) / tokens).sum()

    @torch.no_grad()
    def update_balance(self, index: Optional[Tensor] = None, rate: float = 1e-3) -> None:
        """Moves ``balance_bias`` by the rate, up for blocks that were chosen less often than the mean, and down for
        those chosen more often (loss-free balancing). To be called once after each step of the optimizer: a forward
        pass never moves it, for checkpoints compute twice. Where torch.distributed runs, all processes' choices count.

        Args:
            index: the choices, [..., k], where entries below 0 count for no block; None for those of the last forward
                pass in training.
            rate: the step of the bias, u.

        Raises:
            ValueError: scores other than "sigmoid", or no choices.

        Source: Auxiliary-Loss-Free Load Balancing (Wang et al., 2024).
        """
        if self.balance_bias is None:
            raise ValueError(f"Router.update_balance: expected score to be 'sigmoid', got {self.score!r}")
        index = self.chosen if index is None else index
        if index is None:
            raise ValueError("Router.update_balance: expected index, or a forward pass in training before, got neither")
        counts = torch.bincount(index[index >= 0], minlength=self.num_blocks).float()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        self.balance_bias += rate * (counts.mean() - counts).sign()

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        before = self.balance_bias
        super()._apply(fn, recurse)
        after = self.balance_bias
        if before is not None and after is not None and after.dtype != before.dtype:
            # 16 bits would lose the small steps.
            self.balance_bias = before.to(after.device)
        return self

    def __getstate__(self) -> Dict[str, Any]:
        """A copy starts without the loss, whose graph belongs to a pass of this one."""
        return {**self.__dict__, "balance_loss": None, "chosen": None}

    def extra_repr(self) -> str:
        return (
            f"dim={self.weight.shape[1]}, num_blocks={self.num_blocks}, top_k={self.top_k}, score={self.score!r}, "
            f"renormalize={self.renormalize}, straight_through={self.straight_through}, bias={self.bias is not None}"
        )


def balance_loss(model: nn.Module, weight: float = 1e-2) -> Tensor:
    """The sum of the balance losses of a model's :class:`Router` modules, of their last forward pass, times the weight.

    Args:
        model: one that has computed in training mode.
        weight: of this loss in the whole one.

    Returns:
        A number with a gradient to the routers and to their inputs.

    Raises:
        ValueError: no module of the model has a loss, or one was computed without gradients: under torch.no_grad, or
            in a checkpoint that enters autograd again (use_reentrant=True).

    Source: Switch Transformers (Fedus et al., 2021).

    >>> model = nn.Sequential(torchops.nn.RoutedFFN(32, 64), nn.LayerNorm(32), torchops.nn.RoutedFFN(32, 64))
    >>> output = model(torch.randn(10, 32))
    >>> (output.square().mean() + torchops.nn.balance_loss(model)).backward()
    """
    losses = {name: module.balance_loss for name, module in model.named_modules() if isinstance(module, Router)}
    return weight * sum_of_losses("balance_loss", "Router", losses)
