"""The modules of torchops, each in a small model, for tests under torch.distributed."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from typing import Any

import torch
from own_process import ROOT
from torch import Tensor, nn

from torchops.nn import (
    MixtureOfDepths,
    PyraModulation,
    RoutedFFN,
    Router,
    SpanAttention,
    SparseAttention,
    STFLinear,
    STFProjectedLinear,
    TokenMerger,
    TokenPruner,
    quantization_loss,
)

# Its package would load data, by a library that takes longer than the tests.
vision_transformer = SourceFileLoader(
    "vision_transformer", f"{ROOT}/examples/digits/vision_transformer.py"
).load_module()


class Merging(nn.Module):
    """Tokens are modulated and merged, and others pruned, before and in a block that computes a share of them."""

    def __init__(self) -> None:
        super().__init__()
        self.merger = TokenMerger(2, modulation=PyraModulation(16, 2))
        self.pruner = TokenPruner(0.8)
        self.block = MixtureOfDepths(nn.Linear(16, 16), 16, ratio=0.5)

    def forward(self, input: Tensor) -> Tensor:
        merged, _, _ = self.merger(input)
        return self.block(self.pruner(merged, merged.square().sum(-1))[0])


class Block(nn.Module):
    """A transformer block."""

    def __init__(self, attention: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), attention
        self.ffn_norm, self.ffn = nn.LayerNorm(16), ffn

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        input = input + self.attention(self.norm(input), padding_mask=padding_mask)
        return input + self.ffn(self.ffn_norm(input))


def tokens() -> Tensor:
    return torch.randn(4, 7, 16)


def images() -> Tensor:
    return torch.randn(4, 1, 8, 8)


def square(model: nn.Module, output: Tensor) -> Tensor:
    """A mean over the batch, so that the mean of processes' losses is that of all rows."""
    return output.square().mean()


def with_quantization(model: nn.Module, output: Tensor) -> Tensor:
    return output.square().mean() + quantization_loss(model)


@dataclass(frozen=True)
class ModuleCase:
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor] = tokens
    loss: Callable[[nn.Module, Tensor], Tensor] = square
    # Whether all of its modules that have tensors can draw them anew.
    resets: bool = True


def transformer(reduction: Callable[[], nn.Module] | None = None, **options: list[float]) -> nn.Module:
    reductions = None if reduction is None else [reduction(), reduction()]
    return vision_transformer.VisionTransformer(8, 2, 16, 2, 2, 10, reductions, **options)


def wide_layer() -> STFLinear:
    return STFLinear(16, 40, basis_size=290, nnz=9)  # positions of 16 bits


CASES = {
    "span_attention": ModuleCase(lambda: SpanAttention(16, 4, left=3, right=0, num_kv_heads=2, sink=True)),
    "sparse_attention": ModuleCase(
        lambda: SparseAttention(16, 2, keep=0.5, num_codewords=4, subspace=4, sink=True), loss=with_quantization
    ),
    "factored": ModuleCase(
        lambda: nn.Sequential(wide_layer(), nn.ReLU(), STFLinear(40, 16, 8, 3, sparse_side="input"))
    ),
    "straight_through": ModuleCase(lambda: nn.Sequential(wide_layer().straight_through(), STFLinear(40, 16, 8, 3))),
    "packed": ModuleCase(lambda: nn.Sequential(STFLinear(16, 24, 10, 4).pack(), nn.Linear(24, 5))),
    "projected": ModuleCase(lambda: STFProjectedLinear(nn.Linear(16, 24), 8, 3)),
    "routed_ffn": ModuleCase(lambda: RoutedFFN(16, 32)),
    "routed_ffn_gated": ModuleCase(
        lambda: RoutedFFN(
            16, 24, activation="silu", gated=True, bias=False, router=Router(16, 4, score="softmax", renormalize=True)
        )
    ),
    "routed_ffn_lora": ModuleCase(lambda: RoutedFFN(16, 32, activation="gelu", lora_rank=2)),
    "merging": ModuleCase(Merging),
    "vit_merging": ModuleCase(lambda: transformer(lambda: vision_transformer.MergeTokens(2, 16)), images, resets=False),
    "vit_pruning": ModuleCase(
        lambda: transformer(lambda: vision_transformer.PruneTokens(0.5, fuse=True)), images, resets=False
    ),
    "vit_routed": ModuleCase(lambda: transformer(ratios=[0.5, 1.0]), images, resets=False),
}


def built(case: ModuleCase, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return case.build().double()


def batch(case: ModuleCase) -> Tensor:
    torch.manual_seed(7)
    return case.inputs().double()


@dataclass(frozen=True)
class BlockCase(ModuleCase):
    # How often processes add up, forward and backward, when they divide the block among them.
    sums: tuple[int, int] = (2, 3)
    # The parameters of attention and feed-forward layer that every process then has as a whole, but for the router's.
    undivided: frozenset[str] = frozenset({"out_proj.bias", "b2"})


def block(attention: Callable[[], nn.Module], ffn: Callable[[], nn.Module], **options: Any) -> BlockCase:
    return BlockCase(lambda: Block(attention(), ffn()), **options)


def factored_attention() -> nn.Module:
    """With the sparse factor on the side of heads, and once on the other one."""
    attention = SpanAttention(16, 4)
    attention.q_proj = STFLinear(16, 16, 290, 9)
    attention.k_proj = STFLinear(16, 16, 8, 3).straight_through()
    attention.v_proj = STFLinear(16, 16, 8, 3, sparse_side="input")
    attention.out_proj = STFLinear(16, 16, 8, 3, sparse_side="input")
    return attention


def sparse_attention() -> nn.Module:
    options = {"num_kv_heads": 2, "is_causal": False, "subspace": 2, "num_codewords": 4, "keep": 0.5}
    return SparseAttention(16, 4, sink=True, **options)


# Attention reduces its output and the gradient to its input, and so does the routed layer, and the gradient to gates.
BLOCKS = {
    "block": block(lambda: SpanAttention(16, 4, sink=True), lambda: RoutedFFN(16, 32, activation="gelu")),
    "one_key_head": block(
        lambda: SpanAttention(16, 4, num_kv_heads=1, left=3),
        lambda: RoutedFFN(16, 20, recompute=True),
        undivided=BlockCase.undivided | {f"{name}_proj.{kind}" for name in "kv" for kind in ("weight", "bias")},
    ),
    "sparse_and_gated": block(
        sparse_attention,
        lambda: RoutedFFN(16, 24, activation="silu", gated=True, bias=False),
        loss=with_quantization,
        sums=(3, 3),
        undivided=frozenset({"out_proj.bias", "attend.codebooks"}),
    ),
    "lora": block(
        lambda: SpanAttention(16, 4, bias=False),
        lambda: RoutedFFN(16, 32, lora_rank=2),
        undivided=frozenset({"b2", "lora_a1", "lora_b2"}),
    ),
    # The values of all heads are projected by every process, which sends their gradient.
    "factored": block(
        factored_attention,
        nn.Identity,
        sums=(1, 2),
        undivided=frozenset(
            {
                "v_proj.values",
                "v_proj.bias",
                "out_proj.bias",
                *(f"{name}_proj.basis" for name in ("q", "k", "v", "out")),
            }
        ),
    ),
}
