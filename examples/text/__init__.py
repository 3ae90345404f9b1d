"""Mixed-span attention in a byte-level decoder on the standard library's sources."""

from .track import run as run
