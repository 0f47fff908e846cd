"""What a run was made with: processor, memory, versions."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Optional

PACKAGES = ("moecast", "gluonts", "torch", "lightning", "numpy", "pandas")


def version_of(package: str) -> str:
    """Its version, where it is installed and not only on the path."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "from the path"


def processor_name() -> str:
    """Model of the processor, as far as the system tells."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if "model name" in line:
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_bytes() -> Optional[int]:
    """The most memory that this process has had so far, where the system tells."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe_environment() -> dict[str, str]:
    """Machine and versions, by what a reader calls them; what is not known is left out."""
    import torch

    described = {
        "Processor": processor_name(),
        "Cores": f"{os.cpu_count()}, of which torch used {torch.get_num_threads()}",
        "System": f"{platform.system()} {platform.machine()}",
    }
    if hasattr(os, "getloadavg"):
        load = f"{os.getloadavg()[2]:.1f} programs at a time, mean of the last 15 minutes"
        described["Load of the machine"] = load
    peak_memory = peak_memory_bytes()
    if peak_memory is not None:
        described["Peak memory of the process"] = f"{peak_memory / 1e6:,.0f} MB"
    if torch.cuda.is_available():
        described["GPU"] = torch.cuda.get_device_name()
        if torch.cuda.is_initialized():
            allocated = torch.cuda.max_memory_allocated() / 1e6
            described["Peak memory on the GPU"] = f"{allocated:,.0f} MB"
    described["Python"] = platform.python_version()
    described.update({name: version_of(name) for name in PACKAGES})
    return described
