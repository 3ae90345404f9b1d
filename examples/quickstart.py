"""The operators in thirty lines: ``python -m examples.quickstart``."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

import torchops

torch.manual_seed(0)
tokens = torch.randn(2, 197, 64, requires_grad=True)  # [batch, tokens, channels]; the first is a class token

# Make an assignment of tokens to groups, then move data along it.
assign = torchops.bipartite_assignment(tokens.detach(), r=16, num_protected=1)  # [2, 197], values 0..180
merged, size = torchops.merge_tokens(tokens, assign, num_groups=181)  # [2, 181, 64], [2, 181]
restored = torchops.unmerge_tokens(merged, assign)  # [2, 197, 64]
restored.square().sum().backward()
print(f"merged {tokens.shape[1]} tokens into {merged.shape[1]}, the largest of {size.max():.0f}; {tokens.grad.shape=}")


@torch.jit.script
def keep_half(tokens: Tensor, scores: Tensor) -> Tensor:
    """The half of the tokens with the highest scores, and one that is the mean of the others."""
    k = tokens.shape[1] // 2
    assign = torchops.topk_assignment(scores, k, fuse=True)
    return torchops.merge_tokens(tokens, assign, k + 1)[0]


with tempfile.TemporaryDirectory() as folder:
    file = str(Path(folder) / "keep_half.pt")
    keep_half.save(file)
    loaded = torch.jit.load(file)  # needs the operators, not this source
    print(f"kept {loaded(tokens, tokens.norm(dim=2)).shape[1]} of {tokens.shape[1]} tokens")
