"""Modules on top of the operators, one file per family. All of them can be scripted."""

from .tokens import *  # noqa: F403
