"""A small Vision Transformer that can merge, prune or route its tokens: how torchops goes into a model.

It is a plain pre-norm Vision Transformer but for two things: between attention and MLP, each layer hands
its tokens to a *reduction* (:class:`KeepTokens`, :class:`MergeTokens` or :class:`PruneTokens`), and
attention adds log(size) to the scores of keys that stand for several patches. A routed layer is an
ordinary one inside torchops.nn.MixtureOfDepths. Reductions leave the names of the weights as they are, so
a dense model's weights load. Everything compiles with torch.jit.script and exports with torch.export.
"""

from collections.abc import Mapping, Sequence
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchops


class KeepTokens(nn.Module):
    """The reduction of a dense layer: none. All reductions have this signature."""

    def forward(
        self, tokens: Tensor, query: Tensor, key: Tensor, size: Optional[Tensor]
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """tokens [B, N, C], query and key [B, H, N, D], size [B, N] or None for ones -> tokens [B, M, C],
        size [B, M] or None."""
        return tokens, size


class MergeTokens(nn.Module):
    """Merges the r most similar pairs of tokens (ToMe), similarity being that of the attention's keys.

    Args:
        r: how many tokens go.
        modulation_dim: the tokens' dimension, to modulate them with PYRA before they merge; None for not.
    """

    def __init__(self, r: int, modulation_dim: Optional[int] = None) -> None:
        super().__init__()
        modulation = None if modulation_dim is None else torchops.nn.PyraModulation(modulation_dim, r)
        self.merger = torchops.nn.TokenMerger(r, num_protected=1, modulation=modulation)

    def forward(
        self, tokens: Tensor, query: Tensor, key: Tensor, size: Optional[Tensor]
    ) -> Tuple[Tensor, Optional[Tensor]]:
        tokens, size, _ = self.merger(tokens, key.mean(1), size)
        return tokens, size


class PruneTokens(nn.Module):
    """Keeps the share of tokens that the class token attends to most (EViT). Not behind MergeTokens: sizes
    are not pruned along.

    Args:
        keep: share of the patch tokens to keep.
        fuse: add one token that is the mean of the others, weighted by attention; else they are dropped.
    """

    def __init__(self, keep: float, fuse: bool) -> None:
        super().__init__()
        self.pruner = torchops.nn.TokenPruner(keep, fuse, num_protected=1)

    def forward(
        self, tokens: Tensor, query: Tensor, key: Tensor, size: Optional[Tensor]
    ) -> Tuple[Tensor, Optional[Tensor]]:
        class_scores = query[:, :, :1] @ key.transpose(2, 3) * query.shape[3] ** -0.5  # [B, H, 1, N]
        class_attention = class_scores.softmax(-1).mean(1).squeeze(1)
        tokens, _ = self.pruner(tokens, class_attention)
        return tokens, size


class Block(nn.Module):
    """One layer: attention, reduction, MLP.

    Args:
        dim: C.
        num_heads: H.
        reduction: what happens to the tokens between attention and MLP.
    """

    def __init__(self, dim: int, num_heads: int, reduction: nn.Module) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.projection = nn.Linear(dim, dim)
        self.reduction = reduction
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor, size: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        """tokens [B, N, C], size [B, N] or None -> the same with M tokens."""
        qkv = self.qkv(self.attention_norm(tokens)).unflatten(2, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, D]
        bias: Optional[Tensor] = None
        if size is not None:  # proportional attention
            bias = torchops.nn.proportional_attention_bias(size)[:, None, None].to(query.dtype)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        tokens = tokens + self.projection(attended.transpose(1, 2).flatten(2))
        tokens, size = self.reduction(tokens, query, key, size)
        return tokens + self.mlp(tokens), size


class BlockUpdate(nn.Module):
    """What a block adds to its tokens: the form in which torchops.nn.MixtureOfDepths takes it."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: Tensor) -> Tensor:
        return self.block(tokens, None)[0] - tokens


class RoutedBlock(nn.Module):
    """A block that only the class token and the share ``ratio`` of the others run through (p-MoD); sizes
    pass by."""

    def __init__(self, block: Block, dim: int, ratio: float) -> None:
        super().__init__()
        self.routed = torchops.nn.MixtureOfDepths(BlockUpdate(block), dim, ratio, num_protected=1)

    def forward(self, tokens: Tensor, size: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
        return self.routed(tokens), size


def sine_cosine_positions(side: int, dim: int) -> Tensor:
    """Embeddings of the cells of a square grid, [1, side * side, dim]: half for the row, half for the column."""
    frequency = torch.pi * side ** -(torch.arange(dim // 4) / (dim // 4))
    angle = torch.arange(side).unsqueeze(1) * frequency
    along = torch.cat([angle.sin(), angle.cos()], 1)  # [side, dim / 2]
    rows = along.unsqueeze(1).expand(-1, side, -1)
    columns = along.unsqueeze(0).expand(side, -1, -1)
    return torch.cat([rows, columns], 2).view(1, side * side, dim)


class VisionTransformer(nn.Module):
    """Classifies greyscale images by a class token.

    Args:
        image_size, patch_size: side lengths in pixels.
        dim, depth, num_heads: C, number of layers, H.
        num_classes: length of the output.
        reductions: one per layer; None for a dense model.
        ratios: share of the tokens that runs through each layer; None for all of them. Not together with
            reductions.

    Shapes: forward(images [B, 1, image_size, image_size]) -> logits [B, num_classes].
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        reductions: Optional[Sequence[nn.Module]] = None,
        ratios: Optional[Sequence[float]] = None,
    ) -> None:
        super().__init__()
        if reductions is not None and ratios is not None:
            raise ValueError("VisionTransformer: expected reductions or ratios, got both")
        self.patch_embedding = nn.Conv2d(1, dim, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(sine_cosine_positions(image_size // patch_size, dim))
        nn.init.normal_(self.patch_embedding.weight, std=0.5)  # with less, training dwells on a plateau
        layers: list[nn.Module] = []
        for layer in range(depth):
            block = Block(dim, num_heads, KeepTokens() if reductions is None else reductions[layer])
            routed = ratios is not None and ratios[layer] < 1
            layers.append(RoutedBlock(block, dim, ratios[layer]) if routed else block)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2) + self.position
        tokens = torch.cat([self.class_token.expand(patches.shape[0], -1, -1), patches], 1)
        size: Optional[Tensor] = None
        for layer in self.layers:
            tokens, size = layer(tokens, size)
        return self.head(self.norm(tokens[:, 0]))

    def load_dense_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Takes the weights of a dense model of this size. What it has no weights for, PYRA's modulation
        and routers, stays as it is; anything else that is missing raises."""
        own = {}
        for name, weight in weights.items():
            path = name.split(".")
            if path[0] == "layers" and isinstance(self.layers[int(path[1])], RoutedBlock):
                path.insert(2, "routed.block.block")
            own[".".join(path)] = weight
        missing, unexpected = self.load_state_dict(own, strict=False)
        missing = [name for name in missing if "modulation" not in name and "router" not in name]
        if missing or unexpected:
            raise ValueError(f"not a dense model of this size: missing {missing}, unexpected {unexpected}")
