"""What a benchmark ran on, and how several programs are timed in turn."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Callable, Dict, List, TypeVar

import torch

T = TypeVar("T")


def describe_machine() -> str:
    """Processor, cores, threads, accelerator and the versions that matter, in one line."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        processor = names[0] if names else processor
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = ", ".join(f"{name} {version_of(name)}" for name in ("moecast", "torch", "gluonts"))
    return (
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {accelerator}; "
        f"Python {platform.python_version()}, {versions}"
    )


def version_of(package: str) -> str:
    """Its version, where it is installed and not only on the path."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "from the path"


def time_rounds(runs: Dict[str, Callable[[], T]], rounds: int) -> Dict[str, List[T]]:
    """What each run returns, taken in turn; the first round warms up and does not count."""
    results: Dict[str, List[T]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            result = run()
            if number:
                results[name].append(result)
    return results
