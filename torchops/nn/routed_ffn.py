"""Routed feed-forward layers (SPT): blocks of hidden units, of which a router chooses some for each token."""

from typing import Any, Dict, Optional

import torch
from torch import Tensor, nn

from ..ops.routed_ffn import routed_ffn
from ._conversion import as_linear
from .routed_ffn_calibration import DenseFFN, calibrated
from .routed_ffn_router import Router

__all__ = ["RoutedFFN"]


def draw(parameter: Optional[Tensor], fan_in: int) -> None:
    if parameter is not None:
        nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)


class RoutedFFN(nn.Module):
    """A feed-forward layer of G blocks of hidden units, of which a router chooses k for every token (SPT).

    The operator is :func:`torchops.routed_ffn`. :meth:`from_mlp` splits a trained layer into blocks, and
    :func:`route_ffn_` all layers of a model. With LoRA factors everything except them and the router is frozen. The
    factors a1 and b2, which are multiplied with or give tokens, are shared by all blocks, as in an undivided layer.

    Args:
        dim: d, features of a token.
        hidden_dim: hidden units of all blocks together, a multiple of num_blocks.
        num_blocks: the number of blocks, G.
        top_k: how many blocks compute a token.
        activation, alpha, limit, up_offset, gate_at, lora_scale, recompute: of :func:`torchops.routed_ffn`.
        gated: whether hidden units have a gate, as Llama's: activation(gate) * value.
        bias: whether both layers have biases.
        lora_rank: r of LoRA factors for all weights; 0 for none.
        router: the module that chooses blocks. None for a Router(dim, num_blocks, top_k, straight_through=True).
        device, dtype: of the parameters.

    Shapes: forward(input [..., d]) returns [..., d]. With N = hidden_dim / G: w1 and w_gate [G, N, d], w2 [G, d, N], b1
    [G, N], or [G, 2 N] where gated, b2 [d]; lora_a1 [1, r, d], lora_b1 as b1 with r behind, lora_a2 [G, r, N], lora_b2
    [1, d, r].

    Raises:
        ValueError: hidden_dim is no multiple of num_blocks, or a router of other sizes; as :class:`Router`; in the
            forward pass, as :func:`torchops.routed_ffn`.

    Source: SPT (Gui et al., 2023).

    >>> layer = torchops.nn.RoutedFFN(64, 256, num_blocks=4, top_k=2)
    >>> output = layer(torch.randn(2, 10, 64))
    >>> loss = output.square().mean() + torchops.nn.balance_loss(layer)
    >>> loss.backward()
    """

    w1: Tensor
    w2: Tensor
    w_gate: Optional[Tensor]
    b1: Optional[Tensor]
    b2: Optional[Tensor]
    lora_a1: Optional[Tensor]
    lora_b1: Optional[Tensor]
    lora_a2: Optional[Tensor]
    lora_b2: Optional[Tensor]
    limit: Optional[float]

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_blocks: int = 4,
        top_k: int = 2,
        activation: str = "relu",
        *,
        gated: bool = False,
        alpha: float = 1.0,
        limit: Optional[float] = None,
        up_offset: float = 0.0,
        gate_at: str = "output",
        bias: bool = True,
        lora_rank: int = 0,
        lora_scale: float = 1.0,
        recompute: bool = False,
        router: Optional[nn.Module] = None,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        if num_blocks < 1 or hidden_dim % num_blocks:
            raise ValueError(
                f"RoutedFFN: expected hidden_dim to be a multiple of num_blocks = {num_blocks}, got {hidden_dim}"
            )
        self.activation = activation
        self.glu = "split" if gated else "none"
        self.alpha = alpha
        self.limit = limit
        self.up_offset = up_offset
        self.gate_at = gate_at
        self.lora_scale = lora_scale
        self.recompute = recompute
        units, rank = hidden_dim // num_blocks, lora_rank
        rows = 2 * units if gated else units
        shapes = {
            "w1": (num_blocks, units, dim),
            "w2": (num_blocks, dim, units),
            "w_gate": (num_blocks, units, dim) if gated else None,
            "b1": (num_blocks, rows) if bias else None,
            "b2": (dim,) if bias else None,
            "lora_a1": (1, rank, dim) if rank else None,
            "lora_b1": (num_blocks, rows, rank) if rank else None,
            "lora_a2": (num_blocks, rank, units) if rank else None,
            "lora_b2": (1, dim, rank) if rank else None,
        }
        for name, shape in shapes.items():
            empty = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, empty)
        if router is None:
            router = Router(dim, num_blocks, top_k, straight_through=True, device=device, dtype=dtype)
        elif getattr(router, "num_blocks", num_blocks) != num_blocks:
            raise ValueError(f"RoutedFFN: expected router to choose among {num_blocks} blocks, got {router.num_blocks}")
        self.router = router
        self.freeze_beside_lora()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws what ``nn.Linear`` would; LoRA starts at zero. The router stays."""
        num_blocks, dim, units = self.w2.shape
        for parameter in (self.w1, self.w_gate, self.b1):
            draw(parameter, fan_in=dim)
        for parameter in (self.w2, self.b2):
            draw(parameter, fan_in=num_blocks * units)
        self.reset_lora()

    def freeze_beside_lora(self) -> None:
        """Where there are LoRA factors, they and the router train, and nothing else."""
        for name, parameter in self.named_parameters(recurse=False):
            if self.lora_a1 is not None:
                parameter.requires_grad_(name.startswith("lora"))

    def reset_lora(self) -> None:
        num_blocks, dim, units = self.w2.shape
        draw(self.lora_a1, fan_in=dim)
        draw(self.lora_a2, fan_in=num_blocks * units)
        for factor in (self.lora_b1, self.lora_b2):
            if factor is not None:
                nn.init.zeros_(factor)

    def forward(self, input: Tensor) -> Tensor:
        index, gates = self.router(input)
        return routed_ffn(
            input,
            index,
            gates,
            self.w1,
            self.w2,
            self.b1,
            self.b2,
            self.w_gate,
            self.lora_a1,
            self.lora_b1,
            self.lora_a2,
            self.lora_b2,
            self.activation,
            self.glu,
            self.alpha,
            self.limit,
            self.up_offset,
            self.gate_at,
            self.lora_scale,
            self.recompute,
        )

    @classmethod
    @torch.no_grad()
    def from_mlp(
        cls,
        fc1: nn.Module,
        fc2: nn.Module,
        num_blocks: int = 4,
        top_k: int = 2,
        w_gate: Optional[nn.Module] = None,
        activation: str = "relu",
        calibration: Optional[Tensor] = None,
        lora_rank: int = 0,
        *,
        alpha: float = 1.0,
        gate_at: str = "output",
        lora_scale: float = 1.0,
        recompute: bool = False,
    ) -> "RoutedFFN":
        """Cuts a trained feed-forward layer, fc2(act(fc1(x))) or fc2(act(w_gate(x)) fc1(x)), into blocks of its hidden
        units.

        Gates are 1 and learn (``straight_through`` of :class:`Router`): with all blocks the layer computes what the
        dense one does, and with fewer what these blocks add to that.

        Args:
            fc1, fc2, w_gate: ``nn.Linear``, or transformers' ``Conv1D``. They stay as they are. Mode and what is frozen
                in them are passed on, hooks are not.
            num_blocks, top_k, activation, lora_rank, alpha, gate_at, lora_scale, recompute: of the class.
            calibration: [..., d], typical inputs of the layer, some thousand tokens. Units that are active for the same
                tokens then come into one block, and the router is fitted to how much each block adds to the output.
                Without it blocks are of neighbouring units, and the router starts with small random scores.

        Raises:
            ValueError: layers whose sizes do not match, hidden units that num_blocks does not divide, calibration of
                another size or not finite.

        Source: SPT (Gui et al., 2023); MoEfication (Zhang et al., 2021) for blocks of units that are active together.

        >>> fc1, fc2, inputs = nn.Linear(64, 256), nn.Linear(256, 64), torch.randn(1000, 64)
        >>> layer = torchops.nn.RoutedFFN.from_mlp(fc1, fc2, 4, top_k=4, calibration=inputs)
        >>> torch.testing.assert_close(layer(inputs), fc2(fc1(inputs).relu()))
        """
        first, second = as_linear(fc1), as_linear(fc2)
        gate = None if w_gate is None else as_linear(w_gate)
        dim, hidden_dim = first.in_features, first.out_features
        if (second.in_features, second.out_features) != (hidden_dim, dim):
            raise ValueError(
                f"RoutedFFN.from_mlp: expected fc2 from {hidden_dim} to {dim} features to match fc1, got"
                f" {second.in_features} to {second.out_features}"
            )
        if gate is not None and (gate.in_features, gate.out_features) != (dim, hidden_dim):
            raise ValueError(
                f"RoutedFFN.from_mlp: expected w_gate from {dim} to {hidden_dim} features to match fc1, got"
                f" {gate.in_features} to {gate.out_features}"
            )
        if calibration is not None:
            if calibration.dim() == 0 or calibration.shape[-1] != dim or not calibration.numel():
                raise ValueError(
                    f"RoutedFFN.from_mlp: expected calibration of shape [..., {dim}], got {list(calibration.shape)}"
                )
            if not calibration.isfinite().all():
                raise ValueError("RoutedFFN.from_mlp: expected calibration of finite numbers, got NaN or infinity")
        # Nothing is drawn, since all of it is written below.
        kind: Dict[str, Any] = {"device": torch.device("meta"), "dtype": first.weight.dtype}
        layer = cls(
            dim,
            hidden_dim,
            num_blocks,
            top_k,
            activation,
            gated=gate is not None,
            alpha=alpha,
            gate_at=gate_at,
            bias=False,
            lora_rank=lora_rank,
            lora_scale=lora_scale,
            recompute=recompute,
            router=Router(dim, num_blocks, top_k, straight_through=True, bias=True, **kind),
            **kind,
        ).to_empty(device=first.weight.device)
        router: Any = layer.router
        router.balance_bias.zero_()
        router.bias.zero_()
        if calibration is None:
            units = torch.arange(hidden_dim, device=first.weight.device)
            scores = torch.randn(num_blocks, dim, generator=torch.Generator().manual_seed(0))
            router.weight.copy_(0.02 * scores)
        else:
            dense = DenseFFN(first, second, gate, activation, alpha)
            units, weight, bias = calibrated(dense, calibration, num_blocks)
            router.weight.copy_(weight)
            router.bias.copy_(bias)

        def hold(name: str, tensor: Tensor, trains: bool) -> None:
            setattr(layer, name, nn.Parameter(tensor, trains and not lora_rank))

        def blocks(rows: Tensor) -> Tensor:
            return rows[units].unflatten(0, (num_blocks, -1))

        hold("w1", blocks(first.weight), first.weight.requires_grad)
        hold("w2", blocks(second.weight.T).mT.contiguous(), second.weight.requires_grad)
        biases = [first.bias] if gate is None else [gate.bias, first.bias]
        there = [bias for bias in biases if bias is not None]
        if gate is not None:
            hold("w_gate", blocks(gate.weight), gate.weight.requires_grad)
        if there:
            rows = [blocks(torch.zeros_like(there[0]) if bias is None else bias) for bias in biases]
            hold("b1", torch.cat(rows, 1), there[0].requires_grad)
        if second.bias is not None:
            hold("b2", second.bias.clone(), second.bias.requires_grad)
        layer.reset_lora()
        return layer.train(fc1.training)
