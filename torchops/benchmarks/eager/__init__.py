"""The rivals: what one writes with PyTorch's own operators where torchops is not at hand."""
