"""The one device of a process: opened when first used, closed at exit or once it failed."""

import atexit
import os
from collections import deque
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, Callable, Dict, Hashable, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..errors import BackendUnavailableError, DeviceError
from .detection import find_device, quieten, what_is_missing
from .weights import WeightCache

TILE = 32

# That of MOIRAI small's layer takes 256 KB; one that does not fit is an error.
_TRACE_BYTES = 64 << 20
MOST_TRACES = 128
# What an upload may take of the cores' own memory.
_L1_BYTES = 16 << 20
# Rows of the pieces that a longer upload is worked through in; not measured on a chip.
PIECE_ROWS = 1024


class Prepared(NamedTuple):
    """Weights on the device.

    Attributes
    ----------
    tensors
        Of ttnn, by name; ``None`` where a network has none.
    """

    tensors: Dict[str, Any]


class _Trace(NamedTuple):
    """A recorded program, with the tensors that it reads and writes.

    Attributes
    ----------
    staging
        Where the second queue puts the next input while this one is computed on.
    """

    id: Any
    input: Any
    output: Any
    staging: Any


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
    copies_ahead
        Whether a second command queue copies to the device while it computes.
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
        # Weights may be collected at any time, also while a trace that reads them is replayed.
        self._unused: List[Prepared] = []
        self.weights = WeightCache(self._unused.append)
        self._constants: Dict[Hashable, Any] = {}
        # A trace is a list of commands to the dispatching cores, which slow dispatch and a mock
        # device do without.
        slow = bool(os.environ.get("TT_METAL_SLOW_DISPATCH_MODE"))
        self._records = found.kind != "mock" and not slow
        self._seen: Dict[Hashable, Optional[_Trace]] = {}
        with self.errors_named("could not be opened"):
            recording = {"trace_region_size": _TRACE_BYTES, "num_command_queues": 2}
            self._handle = ttnn.open_device(device_id=0, **(recording if self._records else {}))
        self.copies_ahead = self._records
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
            self._free_unused()
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

        Rows are padded to a bucket. Where there is a second command queue, many of them are cut
        into pieces of one size, so that one trace serves all.

        Parameters
        ----------
        program
            From a tensor on the device to one on the device; rows do not depend on each other.
        key
            Tells programs apart, weights included.
        values
            What is uploaded, ``[..., rows, columns]``, whole tiles of columns.
        dtype
            As what it is uploaded.

        Returns
        -------
        Tensor
            As many rows, in float32.

        Raises
        ------
        DeviceError
            If the device fails or is gone.
        """
        rows = values.shape[-2]
        size = min(bucket(rows), PIECE_ROWS) if self.copies_ahead else bucket(rows)
        values = values.detach().float().cpu()
        padded = torch.nn.functional.pad(values, (0, 0, 0, -rows % size))
        pieces = deque(padded.split(size, dim=-2))
        key = (key, tuple(pieces[0].shape))
        results = []
        with self.errors_named("failed while it computed"):
            if not self.is_open:
                raise RuntimeError("it is closed")
            self._free_unused()
            while pieces and self._seen.get(key) is None:
                results.append(self._start(program, key, self._tiles(pieces.popleft(), dtype)))
            trace = self._seen.get(key)
            if pieces and trace is not None:
                results += self._replay(trace, (self._tiles(piece, dtype) for piece in pieces))
        return torch.cat(results, dim=-2)[..., :rows, :].float()

    def _tiles(self, values: Tensor, dtype: Any) -> Any:
        return self._ttnn.from_torch(values, dtype=dtype, layout=self._ttnn.TILE_LAYOUT)

    def _start(self, program: Callable[[Any], Any], key: Hashable, host: Any) -> Tensor:
        """Command by command; the second time, these are recorded afterwards."""
        ttnn = self._ttnn
        compiled = key in self._seen
        if not compiled:
            # Kernels, too, may come to lie where a trace writes: tt-metal's issue 42698.
            self._forget_traces()
        size = host.volume() * host.element_size()
        memory = ttnn.L1_MEMORY_CONFIG if size <= _L1_BYTES else ttnn.DRAM_MEMORY_CONFIG
        given = ttnn.to_device(host, self._handle, memory_config=memory)
        if not self._records:
            return ttnn.to_torch(program(given))
        staging = ttnn.clone(given, memory_config=ttnn.DRAM_MEMORY_CONFIG)
        ttnn.copy(staging, given)
        result = ttnn.to_torch(program(given))
        if self.num_traces == MOST_TRACES:
            self._forget_traces()
        self._seen[key] = self._record(program, given, staging) if compiled else None
        return result

    def _replay(self, trace: _Trace, hosts: Iterator[Any]) -> List[Tensor]:
        """Each input's output. While queue 0 computes on one, queue 1 copies the next.

        Queue 0 also downloads, so that each output is read before the next overwrites it.
        """
        ttnn = self._ttnn
        # What is copied lives until it was.
        started: List[Tuple[Any, Any]] = []
        staging_read = ttnn.record_event(self._handle, 0)
        for host in hosts:
            if not started:
                ttnn.copy_host_to_device_tensor(host, trace.input)
            else:
                ttnn.wait_for_event(1, staging_read)
                ttnn.copy_host_to_device_tensor(host, trace.staging, cq_id=1)
                ttnn.wait_for_event(0, ttnn.record_event(self._handle, 1))
                ttnn.copy(trace.staging, trace.input)
                staging_read = ttnn.record_event(self._handle, 0)
            ttnn.execute_trace(self._handle, trace.id, cq_id=0, blocking=False)
            started.append((host, trace.output.cpu(blocking=False)))
        ttnn.synchronize_device(self._handle)
        return [ttnn.to_torch(output) for _, output in started]

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

    def _record(self, program: Callable[[Any], Any], given: Any, staging: Any) -> _Trace:
        ttnn = self._ttnn
        trace = ttnn.begin_trace_capture(self._handle, cq_id=0)
        output = program(given)
        ttnn.end_trace_capture(self._handle, trace, cq_id=0)
        return _Trace(trace, given, output, staging)

    def _forget_traces(self) -> None:
        for key, trace in self._seen.items():
            if trace is not None:
                self._ttnn.release_trace(self._handle, trace.id)
                self._seen[key] = None

    def _free_unused(self) -> None:
        if not self._unused:
            return
        self._forget_traces()
        # Its keys may be another program's from now on.
        self._seen.clear()
        while self._unused:
            for tensor in self._unused.pop().tensors.values():
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
            self._free_unused()
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
