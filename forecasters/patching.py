"""Patch sizes: the candidates of a frequency, and the choice among them for each series.

As in MOIRAI (Woo et al. 2024, appendix B): each series holds out the last ``prediction_length``
steps of its history, every candidate forecasts them, and the likeliest is taken.
"""

from typing import Any, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from .frequencies import granularity

_RANGES = {
    "year": (1, 8),
    "quarter": (1, 8),
    "month": (8, 32),
    "week": (16, 32),
    "day": (16, 32),
    "hour": (32, 64),
    "minute": (32, 128),
    "second": (64, 128),
}


def candidate_patch_sizes(freq: str, context_length: int) -> Tuple[int, ...]:
    """Powers of two within the frequency's range of which two fit into the context.

    Raises
    ------
    ValueError
        If the frequency has no range.

    Examples
    --------
    >>> candidate_patch_sizes("h", 336)
    (32, 64)
    >>> candidate_patch_sizes("M", 48)
    (8, 16)
    """
    unit = granularity(freq)
    if unit not in _RANGES:
        raise ValueError(
            f"freq={freq!r} has no patch-size candidates: give patch_size as a number instead of "
            "'auto'"
        )
    smallest, largest = _RANGES[unit]
    powers = (2**exponent for exponent in range(8))
    return tuple(p for p in powers if smallest <= p <= min(largest, context_length // 2))


def resolve_patch_sizes(
    patch_size: Union[int, str, Sequence[int]], freq: Optional[str], context_length: int
) -> Tuple[int, ...]:
    """The patch sizes a network has weights for.

    Parameters
    ----------
    patch_size
        A number, several, or ``"auto"`` for 1 (no patches) and the frequency's candidates.

    Raises
    ------
    ValueError
        If it is neither, lies outside 1…context_length, or the frequency has no candidates.
    """
    if patch_size == "auto":
        if freq is None:
            raise ValueError("patch_size='auto' needs freq, which is None: give one or several")
        return tuple(sorted({1, *candidate_patch_sizes(freq, context_length)}))
    sizes: List[Any] = list(patch_size) if isinstance(patch_size, (list, tuple)) else [patch_size]
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int):
            raise ValueError(f"patch_size={size!r} must be a whole number or 'auto'")
        if not 1 <= size <= context_length:
            raise ValueError(
                f"patch_size={size} must lie between 1 and context_length={context_length}"
            )
    if not sizes:
        raise ValueError("patch_size=[] must hold at least one size")
    return tuple(sorted(set(sizes)))


def fold(series_L: Tensor, patch_size: int) -> Tensor:
    """Fold the last dimension into patches, the phase within the patch first.

    Parameters
    ----------
    series_L
        ``[…, time]``; zeros are put before it up to a multiple of ``patch_size``.

    Returns
    -------
    Tensor
        ``[…, patch_size, patches]``.
    """
    missing = -series_L.shape[-1] % patch_size
    if missing:
        series_L = torch.nn.functional.pad(series_L, (missing, 0))
    return series_L.unflatten(-1, (-1, patch_size)).transpose(-1, -2)


def best_patch_sizes(losses: Sequence[Tensor], patch_sizes: Sequence[int]) -> List[int]:
    """The candidate of smallest held-out loss for each series.

    Parameters
    ----------
    losses
        For each candidate, the loss per series ``[batch]``. Where nothing was held out it is not
        finite, and the smallest candidate is taken.
    """
    by_size = sorted(range(len(patch_sizes)), key=lambda i: patch_sizes[i])
    table = torch.stack([losses[i] for i in by_size], dim=-1)
    table = torch.where(table.isfinite(), table, torch.full_like(table, torch.inf))
    return [patch_sizes[by_size[i]] for i in table.argmin(dim=-1).tolist()]
