"""Runs the kernel tests built with TORCHOPS_KERNEL_COVERAGE and prints which lines of kernels they execute.

coverage.py <build folder> ends with 1 if there is a line in a .cuh file that no test executes. Templates that
nothing instantiates have no lines.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def main(build: Path) -> int:
    for stale in build.rglob("*.gcda"):
        stale.unlink()
    programs = sorted(build.glob("tests/cpp/*_test_coverage"))
    if not programs:
        print(f"no *_test_coverage in {build}: configure with -DTORCHOPS_KERNEL_COVERAGE=ON and build")
        return 1
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda program: subprocess.run([program], check=True, stdout=subprocess.DEVNULL), programs))

    counts: dict[Path, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for data in build.rglob("*.gcda"):
        report = subprocess.run(["gcov", "--json-format", "--stdout", data], check=True, capture_output=True)
        for file in json.loads(report.stdout)["files"]:
            path = Path(file["file"]).resolve()
            # The engine's own device.cuh is no kernel.
            if path.suffix == ".cuh" and path.name != "device.cuh" and path.is_relative_to(ROOT):
                for line in file["lines"]:
                    counts[path][line["line_number"]] += line["count"]

    if not counts:
        print(f"the programs in {build} counted no line of a .cuh file below {ROOT}")
    missed = 0
    for path, lines in sorted(counts.items()):
        unexecuted = sorted(number for number, count in lines.items() if count == 0)
        missed += len(unexecuted)
        covered = 100 * (1 - len(unexecuted) / len(lines))
        print(f"{covered:5.1f}% of {len(lines):4} lines  {path.relative_to(ROOT)}  {unexecuted or ''}")
    return 1 if missed or not counts else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
