"""Gated experts of a few rows, on processors: kernels in C, ``cpu.c``.

The C compiler of the machine compiles them when they are first needed, in a second, for its own
processor; the user's cache keeps them. Where that cannot be, the backend does without.
"""

import ctypes
import functools
import hashlib
import logging
import os
import re
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from itertools import accumulate, chain
from pathlib import Path
from typing import Callable, Optional, Sequence, Union

import torch
from torch import Tensor
from torch.autograd import forward_ad

logger = logging.getLogger(__name__)

# Rows of an expert up to which the kernels are faster than torch's products, or with one thread
# almost as fast (benchmarks/expert_products.py).
MOST_ROWS = 64
# What every number of features must be a multiple of.
_MULTIPLE = 16
_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = (
    *("-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast", "-fPIC"),
    f"-DMOST_ROWS={MOST_ROWS}",
)
_SIZE = ctypes.c_int64


def takes(
    x_TI: Tensor,
    num_tokens: int,
    experts: Sequence[int],
    expand_EIF: Tensor,
    contract_EFO: Tensor,
) -> bool:
    """Whether the kernels are there, and this is for them: what does not fit is left to torch.

    Parameters
    ----------
    num_tokens, experts
        How many tokens chose, and which experts were chosen.
    """
    by_output = x_TI, expand_EIF.mT, contract_EFO.mT
    number, features, expanded_features = expand_EIF.shape
    _, hidden_features, out_features = contract_EFO.shape
    return (
        all(type(t) is Tensor and t.is_cpu and t.dtype == torch.float32 for t in by_output)
        and all(t.is_contiguous() for t in by_output)
        and x_TI.shape == (num_tokens, features)
        and contract_EFO.shape[0] == number
        and expanded_features == 2 * hidden_features
        and not (features % _MULTIPLE or hidden_features % _MULTIPLE or out_features % _MULTIPLE)
        and 0 <= min(experts) <= max(experts) < number
        # Nobody sees inside them: neither a compiler nor derivatives taken on the way.
        and not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and _kernels() is not None
    )


def gated_ffn(
    x_TI: Tensor,
    tokens_R: Union[Tensor, Sequence[int]],
    segments: Sequence[tuple[int, int, int]],
    expand_EIF: Tensor,
    contract_EFO: Tensor,
    outputs_RO: Tensor,
    expanded_SF: Optional[Tensor] = None,
) -> None:
    """Write the outputs of experts, not weighted, where :func:`takes` says that they are for this.

    Parameters
    ----------
    tokens_R
        The token of each row.
    segments
        An expert, the first of its rows and their number, at most ``MOST_ROWS``; in order of the
        rows.
    outputs_RO
        What is written.
    expanded_SF
        Where what the first products give is kept, if it is wanted: the rows of all segments, one
        after the other.
    """
    kernels = _kernels()
    assert kernels is not None
    features, (hidden_features, out_features) = x_TI.shape[1], contract_EFO.shape[1:]
    hidden = x_TI.new_empty(2, MOST_ROWS, hidden_features)
    # Not a tensor, which takes longer to make.
    kept = accumulate((rows for _, _, rows in segments), initial=0)
    numbers = _numbers([*chain.from_iterable((*s, k) for s, k in zip(segments, kept))])
    tokens = tokens_R.data_ptr() if isinstance(tokens_R, Tensor) else _numbers(tokens_R)
    kernels(
        *(x_TI.data_ptr(), tokens, numbers, len(segments)),
        *(expand_EIF.data_ptr(), contract_EFO.data_ptr()),
        *(features, hidden_features, out_features),
        None if expanded_SF is None else expanded_SF.data_ptr(),
        *(hidden.data_ptr(), outputs_RO.data_ptr(), torch.get_num_threads()),
    )


def _numbers(values: Sequence[int]) -> "ctypes.Array[ctypes.c_int64]":
    return (_SIZE * len(values))(*values)


@functools.cache
def _kernels() -> Optional[Callable[..., None]]:
    """The function in C, or ``None`` where it cannot be had."""
    try:
        kernels = _load().moecast_gated_ffn
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        logger.info("Experts of a few rows are torch's products: %s", error)
        return None
    pointer, size = ctypes.c_void_p, _SIZE
    kernels.argtypes = [
        *(pointer, pointer, pointer, size),
        *(pointer, pointer, size, size, size),
        *(pointer, pointer, pointer, ctypes.c_int32),
    ]
    kernels.restype = None
    return kernels


def _load() -> ctypes.CDLL:
    """From the cache, or compiled."""
    if os.environ.get("MOECAST_C_KERNELS") == "0":
        raise RuntimeError("MOECAST_C_KERNELS is 0")
    # Elsewhere nobody has measured that they are faster.
    capability = torch.backends.cpu.get_cpu_capability()
    if sys.platform != "linux" or not capability.startswith("AVX"):
        raise RuntimeError(f"they are for Linux and AVX2, not for {sys.platform} and {capability}")
    compiler, runtime = shlex.split(os.environ.get("CC") or "cc"), _openmp_runtime()
    compile_ = [*compiler, *_FLAGS, *(["-fopenmp"] if runtime else []), "-c", str(_SOURCE)]
    link = [*compiler, "-shared"]
    parts = [_SOURCE.read_text(), *compile_, *link, runtime, _processor()]
    name = f"experts-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.so"
    cache = _cache()
    if cache is not None:
        with suppress(OSError):
            return ctypes.CDLL(str(cache / name))
    with tempfile.TemporaryDirectory(prefix="moecast", dir=cache) as folder:
        made, built = str(Path(folder) / "experts.o"), str(Path(folder) / name)
        libraries = [str(runtime)] if runtime else []
        for command in ([*compile_, "-o", made], [*link, made, *libraries, "-o", built]):
            done = subprocess.run(command, capture_output=True, errors="replace", timeout=120)
            if done.returncode:
                raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr[:500]}")
        # What is loaded stays when its file goes.
        library = ctypes.CDLL(built)
        if cache is not None:
            # Whole or not at all, whoever else is doing the same.
            with suppress(OSError), open(built, "rb") as file:
                os.fsync(file.fileno())
                os.replace(built, cache / name)
        return library


def _cache() -> Optional[Path]:
    """The user's folder for what is compiled, if there is one that nobody else can write."""
    with suppress(OSError, RuntimeError):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moecast"
        if folder.is_absolute():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.stat()
            if status.st_uid == os.getuid() and not status.st_mode & 0o022:
                return folder if os.access(folder, os.W_OK) else None
    return None


def _openmp_runtime() -> Optional[Path]:
    """The one that torch has loaded; another one's threads would stand in its way."""
    lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    paths = [Path(line.split(maxsplit=5)[-1]) for line in lines]
    found = [path for path in paths if re.match(r"lib(gomp|iomp5|omp)[.-]", path.name)]
    of_torch = [path for path in found if path.is_relative_to(Path(torch.__file__).parent)]
    return next(iter([*of_torch, *found]), None)


def _processor() -> str:
    """What it can do: a home may be shared by several machines."""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    return next((line for line in lines if line.startswith("flags")), "")
