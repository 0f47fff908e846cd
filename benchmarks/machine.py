"""What a benchmark ran on, and how several programs are timed in turn."""

import os
import platform
from typing import Callable, Dict, List, TypeVar

import torch
from moecast.evaluation.environment import processor_name, version_of

T = TypeVar("T")


def describe_machine() -> str:
    """Processor, cores, threads, accelerator and the versions that matter, in one line."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = ", ".join(f"{name} {version_of(name)}" for name in ("moecast", "torch", "gluonts"))
    return (
        f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{accelerator}; Python {platform.python_version()}, {versions}"
    )


def time_rounds(runs: Dict[str, Callable[[], T]], rounds: int) -> Dict[str, List[T]]:
    """What each run returns, taken in turn; the first round warms up and does not count."""
    results: Dict[str, List[T]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            result = run()
            if number:
                results[name].append(result)
    return results
