"""Whether there is a Tenstorrent device, and what it takes to use it, without importing ttnn."""

import importlib.util
import os
import platform
from pathlib import Path
from typing import NamedTuple, Optional

_DEVICE_NODES = Path("/dev/tenstorrent")
_SIMULATOR, _MOCK = "TT_METAL_SIMULATOR", "TT_METAL_MOCK_CLUSTER_DESC_PATH"
_COMPILER = Path("sfpi/compiler/bin/riscv-tt-elf-g++")
_SYSTEM_WIDE = Path("/opt/tenstorrent")


class DetectedDevice(NamedTuple):
    """A device that ttnn would open.

    Attributes
    ----------
    kind
        ``"chip"``, ``"simulator"``, or ``"mock"``, on which kernels are compiled and not run.
    name
        For people.
    """

    kind: str
    name: str


def find_device() -> Optional[DetectedDevice]:
    """The device that ttnn would open, ``None`` if there is none."""
    simulator, mock = os.environ.get(_SIMULATOR), os.environ.get(_MOCK)
    if simulator:
        return DetectedDevice("simulator", f"the simulated Tenstorrent device {simulator}")
    if mock:
        return DetectedDevice("mock", f"the mock Tenstorrent device {mock}")
    nodes = sorted(_DEVICE_NODES.glob("*")) if _DEVICE_NODES.is_dir() else []
    return DetectedDevice("chip", f"the Tenstorrent device {nodes[0]}") if nodes else None


def what_is_missing() -> Optional[str]:
    """What this machine lacks to use ttnn, in one clause; ``None`` if it lacks nothing."""
    if find_device() is None:
        return (
            f"there is no Tenstorrent device (nothing in {_DEVICE_NODES}, and {_SIMULATOR} is "
            "not set)"
        )
    spec = importlib.util.find_spec("ttnn")
    if spec is None or spec.origin is None:
        return (
            "ttnn is not installed; it has wheels for Python 3.10 and 3.12 on Linux x86_64, and "
            f"this is Python {platform.python_version()} on {platform.system()} "
            f"{platform.machine()}"
        )
    places = (_SYSTEM_WIDE, Path(spec.origin).parent / "runtime")
    if not any((place / _COMPILER).is_file() for place in places):
        compilers = " nor ".join(str(place / "sfpi") for place in places)
        return f"the SFPI compiler, which builds ttnn's kernels, is neither in {compilers}"
    return None


def quieten() -> None:
    """Silence the logs of ttnn and the libraries below it, unless the user set their level."""
    if "TT_METAL_LOGGER_LEVEL" in os.environ:
        return
    os.environ["TT_METAL_LOGGER_LEVEL"] = "FATAL"
    # ttnn's Python side logs through loguru, which it brings along.
    from loguru import logger

    logger.disable("ttnn")
