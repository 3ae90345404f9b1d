"""Factored linear layers in a real sentence encoder, all-MiniLM-L6-v2."""

from .track import run as run
