"""``python -m torchops``: what this copy is, benchmarks, and the conversion of whole models.

A command is a module of this package with HELP, DESCRIPTION, EXAMPLES, ``add_arguments(parser)`` and
``run(arguments)``, which returns the exit status.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import bench, factorize, info, merge, route
from .errors import CommandError

COMMANDS = {"info": info, "bench": bench, "factorize": factorize, "route": route, "merge": merge}


class Parser(argparse.ArgumentParser):
    """With errors of one line, and descriptions as they are written."""

    def __init__(self, **options: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help says more)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 2 after an error of the user's."""
    parser = Parser(prog="python -m torchops", description="PyTorch operators for efficient transformers.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for name, command in COMMANDS.items():
        of_command = commands.add_parser(
            name, help=command.HELP, description=command.DESCRIPTION, epilog=command.EXAMPLES
        )
        command.add_arguments(of_command)
        of_command.set_defaults(run=command.run, parser=of_command)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except CommandError as error:
        print(f"{arguments.parser.prog}: {error}", file=sys.stderr)
        return 2
