"""What the library registers with torch. Nothing else in Python names its namespaces."""

import torch

NAMESPACE = "torchops"

operators = getattr(torch.ops, NAMESPACE)
cpu = torch.ops.torchops_cpu
"""The functions of csrc/core/capability.cpp, which are no operators."""
