"""Modules on top of the operators, one file per family. All of them can be scripted."""

from ._calibration import *  # noqa: F403
from .routed_ffn import *  # noqa: F403
from .routed_ffn_conversion import *  # noqa: F403
from .routed_ffn_report import *  # noqa: F403
from .routed_ffn_router import *  # noqa: F403
from .span_attention import *  # noqa: F403
from .sparse_attention import *  # noqa: F403
from .sparse_attention_calibration import *  # noqa: F403
from .stf import *  # noqa: F403
from .stf_conversion import *  # noqa: F403
from .stf_projection import *  # noqa: F403
from .stf_report import *  # noqa: F403
from .stf_restoration import *  # noqa: F403
from .tokens import *  # noqa: F403
