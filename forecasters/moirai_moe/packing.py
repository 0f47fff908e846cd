"""Several short windows in one row, so that no work goes into the padding before them.

Shape suffixes: B windows, L patches of a window, R rows, S slots of a row, of a patch each.
"""

from bisect import bisect_left, insort
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

# Windows are packed if the rows have at most this share of the patches, padding included. In
# benchmarks/moirai_moe_packing.py --shares a step is shorter below, and above as long as before.
_LARGEST_SHARE = 0.9


class Slots(NamedTuple):
    """Which patches, or tokens, stand where in rows.

    Attributes
    ----------
    position
        Of each one in its window, ``[R or 1, S]``.
    window
        Which window each is of ``[R, S]``, and -1 in empty slots; ``None`` if rows are windows.
    present
        Which are there and none of the padding ``[R, S]``; ``None`` if all are.
    """

    position: Tensor
    window: Optional[Tensor]
    present: Optional[Tensor]

    @classmethod
    def of_windows(
        cls, num_patches: int, present: Optional[Tensor], device: torch.device
    ) -> "Slots":
        """A row for each window, with its padding."""
        return cls(torch.arange(num_patches, device=device).unsqueeze(0), None, present)

    def of_tokens(self, num_variates: int) -> "Slots":
        """For each slot of a patch, one for the token of each variate."""

        def repeat(field: Tensor) -> Tensor:
            return field.repeat_interleave(num_variates, dim=1)

        return Slots(
            repeat(self.position),
            None if self.window is None else repeat(self.window),
            None if self.present is None else repeat(self.present),
        )


class Packing(NamedTuple):
    """Into which slots the patches of a batch of windows go.

    Attributes
    ----------
    patch_of_slot
        Counted through all windows ``[R, S]``, and -1 for empty slots.
    slot_of_patch
        Counted through all rows ``[B, L]``; 0 for padding, which has no slot.
    """

    patch_of_slot: Tensor
    slot_of_patch: Tensor

    @property
    def slots(self) -> Slots:
        num_patches = self.slot_of_patch.shape[1]
        window = torch.div(self.patch_of_slot, num_patches, rounding_mode="floor")
        return Slots(self.patch_of_slot % num_patches, window, self.patch_of_slot >= 0)

    def pack(self, x: Tensor) -> Tensor:
        """``[R, S, …]`` of ``[B, L, …]``; what empty slots hold has no meaning."""
        return _gather(x, self.patch_of_slot.clamp_min(0))

    def unpack(self, x: Tensor) -> Tensor:
        """``[B, L, …]`` of ``[R, S, …]``; what padding gets has no meaning."""
        return _gather(x, self.slot_of_patch)


def find_packing(present: Optional[Tensor]) -> Optional[Packing]:
    """How to pack windows, or ``None`` where that saves too little.

    Rows are as long as the longest window. Windows are placed by decreasing length, each into the
    row with the least room that is enough (best fit).

    Parameters
    ----------
    present
        Which patches are none of the padding before a window ``[B, L]``; ``None`` if all are.
    """
    if present is None:
        return None
    batch, num_patches = present.shape
    lengths = present.sum(dim=1)
    first_slots, num_rows, row_length = place(lengths.tolist())
    num_slots = num_rows * row_length
    if num_slots > _LARGEST_SHARE * batch * num_patches:
        return None
    first = torch.tensor(first_slots, device=present.device) - (num_patches - lengths)
    patches = torch.arange(num_patches, device=present.device)
    # Padding is sent behind the last slot and forgotten.
    slot_of_patch = torch.where(present, first.unsqueeze(1) + patches, num_slots)
    patch_of_slot = torch.full((num_slots + 1,), -1, device=present.device)
    patch_of_slot[slot_of_patch.flatten()] = torch.arange(
        batch * num_patches, device=present.device
    )
    return Packing(
        patch_of_slot[:-1].unflatten(0, (num_rows, row_length)),
        slot_of_patch.masked_fill(~present, 0),
    )


def place(lengths: Sequence[int]) -> Tuple[List[int], int, int]:
    """The first slot of each window, counted through all rows; the rows; the slots of each."""
    row_length = max(lengths)
    first_slots = [0] * len(lengths)
    # Room left and row, of the rows that have any, the least room first.
    open_rows: List[Tuple[int, int]] = []
    num_rows = 0
    for window in sorted(range(len(lengths)), key=lambda window: -lengths[window]):
        fitting = bisect_left(open_rows, (lengths[window], 0))
        if fitting < len(open_rows):
            room, row = open_rows.pop(fitting)
        else:
            room, row = row_length, num_rows
            num_rows += 1
        first_slots[window] = (row + 1) * row_length - room
        if room > lengths[window]:
            insort(open_rows, (room - lengths[window], row))
    return first_slots, num_rows, row_length


def _gather(x: Tensor, index: Tensor) -> Tensor:
    gathered = x.flatten(0, 1).index_select(0, index.flatten())
    return gathered.unflatten(0, index.shape)
