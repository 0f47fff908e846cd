"""The one device of a process: opened when first used, closed at exit or once it failed."""

import atexit
import os
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, Callable, Dict, Hashable, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..errors import BackendUnavailableError, DeviceError
from .detection import find_device, quieten, what_is_missing
from .weights import WeightCache

TILE = 32

_TRACE_BYTES = 16 << 20
# What an upload may take of the cores' own memory.
_L1_BYTES = 16 << 20


class Prepared(NamedTuple):
    """Weights on the device.

    Attributes
    ----------
    tensors
        Of ttnn, by name; ``None`` where a network has none.
    """

    tensors: Dict[str, Any]


class _Trace(NamedTuple):
    """A recorded program, with the tensors that it reads and writes."""

    id: Any
    input: Any
    output: Any


class Device:
    """An open Tenstorrent device.

    Raises
    ------
    BackendUnavailableError
        If it cannot be had.
    DeviceError
        If it cannot be opened.

    Attributes
    ----------
    name
        For people.
    weights
        What was uploaded.
    """

    def __init__(self) -> None:
        missing = what_is_missing()
        found = find_device()
        if missing or found is None:
            raise BackendUnavailableError(f"backend='ttnn' cannot be had: {missing}")
        quieten()
        import ttnn

        self._ttnn = ttnn
        self.name = found.name
        self.weights = WeightCache(self._release)
        self._constants: Dict[Hashable, Any] = {}
        # A trace is a list of commands to the dispatching cores, which slow dispatch and a mock
        # device do without.
        slow = bool(os.environ.get("TT_METAL_SLOW_DISPATCH_MODE"))
        self._records = found.kind != "mock" and not slow
        self._seen: Dict[Hashable, Optional[_Trace]] = {}
        with self.errors_named("could not be opened"):
            region = {"trace_region_size": _TRACE_BYTES} if self._records else {}
            self._handle = ttnn.open_device(device_id=0, **region)
        self.is_open = True
        atexit.register(self.close)

    @property
    def handle(self) -> Any:
        """What ttnn calls the device."""
        return self._handle

    @cached_property
    def kernel_config(self) -> Any:
        """Products accumulated in float32, nothing approximated."""
        ttnn = self._ttnn
        return ttnn.init_device_compute_kernel_config(
            self._handle.arch(),
            math_fidelity=ttnn.MathFidelity.HiFi4,
            math_approx_mode=False,
            fp32_dest_acc_en=True,
            packer_l1_acc=True,
        )

    @contextmanager
    def errors_named(self, what: str) -> Iterator[None]:
        """Turn errors of the C++ library into one sentence that names the device."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            if isinstance(error, DeviceError):
                raise
            with suppress(RuntimeError):
                self.close()
            raise DeviceError(
                f"{self.name} {what} ({_reason(error)}): predictor.to_backend('torch') goes on "
                "without it"
            ) from error

    def upload(self, values: Tensor, dtype: Any) -> Any:
        """A tensor in tiles, in the device's memory."""
        ttnn = self._ttnn
        return ttnn.from_torch(
            values.detach().float().cpu().contiguous(),
            dtype=dtype,
            layout=ttnn.TILE_LAYOUT,
            device=self._handle,
            memory_config=ttnn.DRAM_MEMORY_CONFIG,
        )

    def prepare(
        self, sources: List[Tensor], purpose: Hashable, make: Callable[[], Dict[str, Any]]
    ) -> Dict[str, Any]:
        """Weights made of ``sources`` and uploaded, by ``make``, unless they are there already."""

        def uploaded() -> Prepared:
            # A trace writes where memory was free when it was recorded, which is where new
            # weights may come to lie.
            self._forget_traces()
            return Prepared(make())

        return self.weights.get(sources, purpose, uploaded).tensors

    def constant(self, value: float, shape: Tuple[int, ...]) -> Any:
        """A bfloat16 tensor of one number, row by row, uploaded once."""
        ttnn, key = self._ttnn, (value, shape)
        if key not in self._constants:
            self._forget_traces()
            self._constants[key] = ttnn.from_torch(
                torch.full(shape, value),
                dtype=ttnn.bfloat16,
                layout=ttnn.ROW_MAJOR_LAYOUT,
                device=self._handle,
            )
        return self._constants[key]

    def run(
        self, program: Callable[[Any], Any], key: Hashable, values: Tensor, dtype: Any
    ) -> Tensor:
        """Upload, compute, download.

        Parameters
        ----------
        program
            From a tensor on the device to one on the device.
        key
            Tells programs apart, weights included.
        values
            What is uploaded, whole tiles of it.
        dtype
            As what it is uploaded.

        Raises
        ------
        DeviceError
            If the device fails or is gone.
        """
        ttnn = self._ttnn
        with self.errors_named("failed while it computed"):
            if not self.is_open:
                raise RuntimeError("it is closed")
            host = ttnn.from_torch(values, dtype=dtype, layout=ttnn.TILE_LAYOUT)
            key = (key, tuple(values.shape))
            trace = self._seen.get(key)
            if trace is None:
                memory = (
                    ttnn.L1_MEMORY_CONFIG
                    if values.numel() * values.element_size() <= _L1_BYTES
                    else ttnn.DRAM_MEMORY_CONFIG
                )
                given = ttnn.to_device(host, self._handle, memory_config=memory)
                output = program(given)
                result = ttnn.to_torch(output)
                if self._records and key in self._seen:
                    # Compiled by now, so that what is recorded only has to be replayed.
                    self._seen[key] = self._record(program, given)
                else:
                    self._seen[key] = None
            else:
                ttnn.copy_host_to_device_tensor(host, trace.input)
                ttnn.execute_trace(self._handle, trace.id, cq_id=0, blocking=False)
                result = ttnn.to_torch(trace.output)
        return result.float()

    @property
    def num_traces(self) -> Optional[int]:
        """How many programs are replayed by now; ``None`` if this device replays none."""
        return sum(trace is not None for trace in self._seen.values()) if self._records else None

    @contextmanager
    def without_traces(self) -> Iterator[None]:
        """Start every program one by one inside."""
        records, self._records = self._records, False
        self._forget_traces()
        try:
            yield
        finally:
            self._records = records

    def _record(self, program: Callable[[Any], Any], given: Any) -> _Trace:
        ttnn = self._ttnn
        trace = ttnn.begin_trace_capture(self._handle, cq_id=0)
        output = program(given)
        ttnn.end_trace_capture(self._handle, trace, cq_id=0)
        return _Trace(trace, given, output)

    def _forget_traces(self) -> None:
        for trace in self._seen.values():
            if trace is not None:
                self._ttnn.release_trace(self._handle, trace.id)
        self._seen.clear()

    def _release(self, prepared: Prepared) -> None:
        if not self.is_open:
            return
        self._forget_traces()
        for tensor in prepared.tensors.values():
            if tensor is not None:
                self._ttnn.deallocate(tensor)

    def close(self) -> None:
        """Give the device back; another use opens it anew."""
        global _device
        atexit.unregister(self.close)
        if _device is self:
            _device = None
        if not getattr(self, "is_open", False):
            return
        try:
            self.weights.clear()
            self._constants.clear()
            self._forget_traces()
        finally:
            self.is_open = False
            self._ttnn.close_device(self._handle)


_device: Optional[Device] = None


def the_device() -> Device:
    """The process's device, opened if it is not open."""
    global _device
    if _device is None:
        _device = Device()
    return _device


def _reason(error: Exception) -> str:
    """What a C++ exception says, without where and how it came about."""
    text, _, _ = str(error).partition("backtrace:")
    place, _, info = text.partition("info:")
    lines = (info or place).strip().splitlines()
    return lines[0].strip().rstrip(".")[:200] if lines else type(error).__name__


def whole_tiles(size: int) -> int:
    return -(-size // TILE) * TILE


def bucket(rows: int) -> int:
    """Rows that as many are padded to: a power of two, so that few shapes are ever compiled."""
    return max(TILE, 1 << (rows - 1).bit_length())
