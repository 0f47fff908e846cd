"""The hierarchical Autoformer's settings."""

import dataclasses
import math
from typing import Optional, Tuple

import pywt
from gluonts.torch.distributions import Output

from ..fields import FrozenSettings, WindowConfig
from ..moe import check_routing

# The discrete Meyer wavelet's filters are cut off, and do not give the sequence back.
WAVELETS = tuple(name for name in pywt.wavelist(kind="discrete") if name != "dmey")

_MOST_WAVELET_LEVELS = 10

DECOMPOSITIONS = ("input", "layers", None)


@dataclasses.dataclass(frozen=True)
class AutoformerConfig(FrozenSettings):
    """Settings of :class:`AutoformerNetwork`; its estimator describes each.

    Raises
    ------
    ValueError
        If a name is unknown or a number out of range.
    """

    window: WindowConfig
    distr_output: Output
    scaling: str
    patch_sizes: Tuple[int, ...]
    label_length: int
    d_model: int
    d_ff: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_experts: int
    top_k: Optional[int]
    wavelet: Optional[str]
    wavelet_levels: int
    decomposition: Optional[str]
    moving_average: int
    delay_factor: float
    dropout: float
    backend: str

    def __post_init__(self) -> None:
        for name in (
            "d_model",
            "d_ff",
            "num_heads",
            "num_encoder_layers",
            "num_decoder_layers",
            "label_length",
            "wavelet_levels",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.label_length > self.window.context_length:
            raise ValueError(
                f"label_length={self.label_length} must be at most context_length="
                f"{self.window.context_length}, whose end it is"
            )
        if self.d_model % self.num_heads:
            raise ValueError(
                f"d_model={self.d_model} must be a multiple of num_heads={self.num_heads}"
            )
        if self.moving_average < 3 or self.moving_average % 2 == 0:
            raise ValueError(
                f"moving_average={self.moving_average} must be an odd number of at least 3"
            )
        if self.wavelet_levels > _MOST_WAVELET_LEVELS:
            raise ValueError(
                f"wavelet_levels={self.wavelet_levels} must be at most {_MOST_WAVELET_LEVELS}: "
                "each halves the number of tokens"
            )
        if not 0 < self.delay_factor < math.inf:
            raise ValueError(f"delay_factor={self.delay_factor} must be a positive number")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if self.decomposition not in DECOMPOSITIONS:
            raise ValueError(
                f"decomposition={self.decomposition!r} is unknown: choose 'input', 'layers' or None"
            )
        check_routing(self.num_experts, self.top_k, head_dropout=0.0)
        if self.wavelet is not None and self.wavelet not in WAVELETS:
            raise ValueError(
                f"wavelet={self.wavelet!r} is none of PyWavelets' discrete wavelets that give a "
                "sequence back: use 'db4', 'haar', 'sym4', 'coif1', … or None"
            )

    @property
    def num_resolutions(self) -> int:
        return 1 if self.wavelet is None else self.wavelet_levels + 1
