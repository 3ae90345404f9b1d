"""What a run ran on."""

import datetime
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import torchops

REPOSITORY = Path(__file__).resolve().parents[3]
"""The checkout that the package lies in; anything where it is installed."""


def describe(device: torch.device) -> dict[str, Any]:
    config = torchops.utils.config()
    del config["library"]  # a path, which says nothing to anybody else
    machine = {
        "device": device.type,
        "cpu": cpu_name(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": config,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["cuda"] = torch.version.cuda
    return machine


class OtherLoad:
    """What other processes use of all cores while it exists: figures taken beside much of it are no good."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.others = self.seconds_of_others()

    def share(self) -> float | None:
        """Between 0 and 1, or None where the system does not tell."""
        others = self.seconds_of_others()
        if self.others is None or others is None:
            return None
        core_seconds = (time.perf_counter() - self.start) * (os.cpu_count() or 1)
        return round(max(0.0, others - self.others) / core_seconds, 2)

    @staticmethod
    def seconds_of_others() -> float | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system = (int(ticks) for ticks in stat.read_text().split()[1:4])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK") - time.process_time()


def num_cores() -> int:
    """Logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The model's name, with family and model number: virtual machines shorten the name."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", info.read_text(), re.MULTILINE))
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


def cpu_flags() -> set[str]:
    """Instruction sets by the names that Linux gives them; none where the system does not tell."""
    info = Path("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return set(flags[1].split()) if flags else set()


def available_bytes(device: torch.device) -> int | None:
    """Memory that a row may still take, or None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    available = re.search(r"^MemAvailable:\s+(\d+) kB", info.read_text(), re.MULTILINE) if info.exists() else None
    return int(available[1]) * 1024 if available else None


def last_level_cache_bytes(device: torch.device) -> int | None:
    """Of the largest cache, or None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=None)


def slug(device: torch.device) -> str:
    """The processor's name as part of a file's name, with the level of its kernels, because virtual machines give
    one name to many: "Intel(R) Xeon(R) CPU @ 2.20GHz (family 6, model 85)" is "intel-xeon-avx512"."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_name().partition(' (family')[0]} {torchops.utils.cpu_capability()}"
    name = re.sub(r"\(R\)|\(TM\)|\bCPU\b|\bProcessor\b|@\s*\S+", " ", name)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def is_checkout() -> bool:
    return (REPOSITORY / "csrc").is_dir()


def commit() -> str | None:
    """The commit checked out, marked where the operators' sources differ from it; None without git or a checkout."""
    if not is_checkout():
        return None
    git = ["git", "-C", str(REPOSITORY)]
    sources = ["csrc", "torchops", ":!torchops/benchmarks"]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "--", *sources], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + (" with changes" if changes.stdout else "")
