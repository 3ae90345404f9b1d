"""Token merging, pruning and routing in a Vision Transformer on handwritten digits."""

from .track import run as run
