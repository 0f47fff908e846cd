"""MOIRAI-MoE's settings."""

import dataclasses
from typing import Tuple

from gluonts.torch.distributions import DistributionOutput, Output

from ..fields import FrozenSettings, WindowConfig
from ..moe import check_routing

DECODINGS = ("cached", "reencode")


@dataclasses.dataclass(frozen=True)
class MoiraiMoEConfig(FrozenSettings):
    """Settings of :class:`MoiraiMoENetwork`; :class:`MoiraiMoEEstimator` describes each.

    Raises
    ------
    ValueError
        If a name is unknown, a number out of range, or the window longer than the model reads.
    """

    window: WindowConfig
    distr_output: Output
    scaling: str
    patch_sizes: Tuple[int, ...]
    d_model: int = 384
    d_ff: int = 512
    num_layers: int = 6
    num_heads: int = 6
    num_experts: int = 32
    top_k: int = 2
    max_seq_len: int = 512
    dropout: float = 0.0
    attention_dropout: float = 0.0
    # Patch sizes that the network has weights for, of which ``patch_sizes`` are forecast with.
    trained_patch_sizes: Tuple[int, ...] = ()
    covariates_ahead: bool = False
    decoding: str = "cached"
    gradient_checkpointing: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "trained_patch_sizes", self.trained_patch_sizes or self.patch_sizes
        )
        for name in ("d_model", "d_ff", "num_layers", "num_heads", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.d_model % (4 * self.num_heads):
            raise ValueError(
                f"d_model={self.d_model} must be a multiple of 4 * num_heads={4 * self.num_heads}: "
                "positions turn pairs of numbers in one half of each head"
            )
        check_routing(self.num_experts, self.top_k, 0.0)
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        if self.decoding not in DECODINGS:
            raise ValueError(
                f"decoding={self.decoding!r} is unknown: choose one of {', '.join(DECODINGS)}"
            )
        unknown = set(self.patch_sizes) - set(self.trained_patch_sizes)
        if unknown:
            raise ValueError(
                f"patch_size={min(unknown)} is none that the network has weights for: choose one "
                f"of {', '.join(map(str, self.trained_patch_sizes))} or 'auto'"
            )
        if not _can_be_drawn(self.distr_output) and any(
            self.num_future_patches(patch_size) > 1 for patch_size in self.patch_sizes
        ):
            raise ValueError(
                f"distr_output={type(self.distr_output).__name__} cannot be drawn from patch by "
                f"patch: use a distribution such as 'student_t', or patches of at least "
                f"{self.window.future_length} steps"
            )
        for patch_size in self.patch_sizes:
            future = self.num_future_patches(patch_size)
            if self.num_context_patches(patch_size) + future > self.max_seq_len:
                longest = (self.max_seq_len - future) * patch_size
                raise ValueError(
                    f"context_length={self.window.context_length} with patches of {patch_size} "
                    f"and {self.window.future_length} steps to forecast is more than "
                    f"max_seq_len={self.max_seq_len} patches: use at most "
                    f"context_length={max(longest, 0)}"
                )

    def num_context_patches(self, patch_size: int) -> int:
        """Patches of the context, the first perhaps padded."""
        return -(-self.window.context_length // patch_size)

    def num_future_patches(self, patch_size: int) -> int:
        """Patches of lead time and horizon, the last perhaps longer than they are."""
        return -(-self.window.future_length // patch_size)


def _can_be_drawn(distr_output: Output) -> bool:
    own_projection = type(distr_output).get_args_proj is not Output.get_args_proj
    return isinstance(distr_output, DistributionOutput) and not own_projection
