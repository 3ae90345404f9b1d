"""Modules on top of the operators, one file per family. All of them can be scripted."""

from .span_attention import *  # noqa: F403
from .tokens import *  # noqa: F403
