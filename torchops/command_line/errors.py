"""What a user can repair: it ends a command with exit status 2 and its message, without a traceback."""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager

USUAL: tuple[type[Exception], ...] = (ImportError, OSError, TypeError, ValueError)


class CommandError(Exception):
    pass


@contextmanager
def user_errors(*others: type[Exception]) -> Iterator[None]:
    """Around calls with what the user gave, whose errors, these and others, say what is wrong with it."""
    try:
        yield
    except (*USUAL, *others) as error:
        # What functions call skip=['a', 'b'] is --skip 'a' 'b' here.
        message = re.sub(r"skip=\[(.*?)\]", lambda found: f"--skip {found[1].replace(',', '')}", str(error))
        raise CommandError(message) from error


def need(module: str, extra: str) -> None:
    """That a package is installed, which an extra of torchops brings."""
    if importlib.util.find_spec(module) is None:
        raise CommandError(f"{module} is not installed: pip install {module}, or torchops[{extra}]")
