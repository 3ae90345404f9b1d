"""PyTorch operators for efficient transformers, in C++ for CPU and CUDA, with gradients.

Importing the package loads its library, which registers every operator with torch's dispatcher:
``torch.ops.torchops.*`` is then there in Python, in TorchScript and in exported programs. The
functions here are the same operators with documentation; modules are in :mod:`torchops.nn`, the
mathematics in plain PyTorch in :mod:`torchops.reference`.
"""

from ._library import load as _load

_load()

# Each family's functions; everything below needs the operators to be registered.
from . import flops as flops  # noqa: E402
from . import nn as nn  # noqa: E402
from . import reference as reference  # noqa: E402
from . import utils as utils  # noqa: E402
from ._build import VERSION as _VERSION  # noqa: E402
from .decompositions import decompositions as decompositions  # noqa: E402
from .ops.merge_attention import *  # noqa: E402, F403
from .ops.routed_ffn import *  # noqa: E402, F403
from .ops.span_attention import *  # noqa: E402, F403
from .ops.sparse_attention import *  # noqa: E402, F403
from .ops.stf import *  # noqa: E402, F403
from .ops.tokens import *  # noqa: E402, F403
from .utils import show_config as show_config  # noqa: E402

__version__ = _VERSION
