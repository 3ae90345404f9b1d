"""Factored linear layers in a real language model of antibodies, AntiBERTy."""

from .track import run as run
