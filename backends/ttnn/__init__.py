"""Routers and experts on Tenstorrent devices, by ttnn.

ttnn itself is imported when a device is opened, which is when something is first computed.
"""

from .backend import PRECISIONS, TtnnBackend
from .detection import DetectedDevice, find_device, what_is_missing

__all__ = ["PRECISIONS", "DetectedDevice", "TtnnBackend", "find_device", "what_is_missing"]
