"""The registered operators. Nothing else in Python names their namespace."""

import torch

NAMESPACE = "torchops"

operators = getattr(torch.ops, NAMESPACE)
