"""The mathematics of every operator in plain PyTorch, one module per family.

Written to be read: no attention is paid to speed, and every function takes the same arguments as the
operator of its name. The tests hold the operators to it.
"""

from . import routed_ffn as routed_ffn
from . import span_attention as span_attention
from . import sparse_attention as sparse_attention
from . import stf as stf
from . import tokens as tokens
