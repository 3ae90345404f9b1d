"""The main job: train, convert, fine-tune, compare and export models with torchops.

python -m examples.demo            everything, minutes
python -m examples.demo --short    every step, none of them for long
torchrun --nproc-per-node 2 -m examples.demo    the same, trained by two processes
"""

import argparse
import time
from pathlib import Path

import torchops

from . import digits, text
from .common.distributed import IS_MAIN, process_group
from .common.report import console

TRACKS = {"digits": digits.run, "text": text.run}
OUTPUT = Path(__file__).resolve().parent / "output"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tracks", nargs="*", metavar="track", help=f"of {', '.join(TRACKS)}; all of them by default")
    parser.add_argument("--short", action="store_true", help="run every step for a short time only")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write to (default: %(default)s)")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.tracks) - set(TRACKS))
    if unknown:
        parser.error(f"no track named {', '.join(unknown)}; there are {', '.join(TRACKS)}")

    if IS_MAIN:
        torchops.show_config()
    summaries = []
    with process_group():
        for name in arguments.tracks or TRACKS:
            console.rule(name)
            start = time.perf_counter()
            summary = TRACKS[name](arguments.short, arguments.output)
            seconds = time.perf_counter() - start
            summaries.append(f"{name} ({seconds:.0f} s, files in {arguments.output / name}): {summary}")
    console.rule("summary")
    for summary in summaries:
        console.print(summary)


if __name__ == "__main__":
    main()
