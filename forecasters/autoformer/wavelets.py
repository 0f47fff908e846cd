"""A sequence as wavelet coefficients, a band for each resolution (Mallat 1989)."""

from typing import List

import pywt
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WaveletTransform(nn.Module):
    """The discrete wavelet transform of each feature along time, and its inverse.

    Sequences are continued periodically, so that all bands together have as many coefficients as
    the sequence, and :meth:`rebuild` gives it back.

    Parameters
    ----------
    wavelet
        A name of PyWavelets' discrete wavelets.
    levels
        How often the coarsest band is split again.
    """

    analysis: Tensor
    synthesis: Tensor

    def __init__(self, wavelet: str, levels: int) -> None:
        super().__init__()
        self.levels = levels
        filters = pywt.Wavelet(wavelet)
        # A convolution of torch's slides the filter over the sequence without turning it round.
        analysis = torch.tensor([filters.dec_lo[::-1], filters.dec_hi[::-1]])
        synthesis = torch.tensor([filters.rec_lo, filters.rec_hi])
        # Two filters over one channel, or the reverse; the width of 1 lies across the features.
        for name, weight in (("analysis", analysis), ("synthesis", synthesis)):
            self.register_buffer(name, weight[:, None, :, None], persistent=False)

    @property
    def shortest(self) -> int:
        """What the length of a sequence must be a multiple of."""
        return 2**self.levels

    def decompose(self, x_BTD: Tensor) -> List[Tensor]:
        """The bands ``[B, T / 2^level, D]``, the coarsest first.

        The first is the approximation; the details of the coarsest level follow, which have its
        length, and those of each finer one.
        """
        coarse, bands = x_BTD.unsqueeze(1), []
        for _ in range(self.levels):
            both = self._split(coarse)
            coarse, detail = both[:, :1], both[:, 1]
            bands.append(detail)
        return [coarse.squeeze(1), *reversed(bands)]

    def rebuild(self, bands: List[Tensor]) -> Tensor:
        """The sequence ``[B, T, D]`` of the bands of :meth:`decompose`."""
        coarse, *details = bands
        for detail in details:
            coarse = self._join(torch.stack([coarse, detail], dim=1)).squeeze(1)
        return coarse

    def _split(self, x_B1TD: Tensor) -> Tensor:
        length, taps = x_B1TD.shape[2], self.analysis.shape[2]
        before = taps // 2 - 1
        around = torch.arange(-before, length + taps - 2 - before, device=x_B1TD.device) % length
        return F.conv2d(x_B1TD.index_select(2, around), self.analysis, stride=(2, 1))

    def _join(self, bands_B2TD: Tensor) -> Tensor:
        length, taps = bands_B2TD.shape[2], self.synthesis.shape[2]
        # Coefficients beyond both ends reach into the sequence by the length of the filters.
        beyond = taps // 2
        around = torch.arange(-beyond, length + beyond, device=bands_B2TD.device) % length
        extended = bands_B2TD.index_select(2, around)
        joined = F.conv_transpose2d(extended, self.synthesis, stride=(2, 1))
        first = 2 * beyond + taps // 2 - 1
        return joined[:, :, first : first + 2 * length]
