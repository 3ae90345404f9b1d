"""The operators, one module per family: documented, scriptable functions over ``torch.ops.torchops``."""
