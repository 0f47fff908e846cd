"""MoLE's settings."""

import dataclasses
from typing import Optional, Tuple

from gluonts.torch.distributions import Output

from ..fields import FrozenSettings, WindowConfig
from ..frequencies import time_features
from ..moe import check_routing

EXPERTS = ("dlinear", "rlinear", "rmlp")
ROUTERS = ("calendar", "statistics", "window")


@dataclasses.dataclass(frozen=True)
class MoLEConfig(FrozenSettings):
    """Settings of :class:`MoLENetwork`; :class:`MoLEEstimator` describes each.

    Raises
    ------
    ValueError
        If a name is unknown or a number out of range.
    """

    window: WindowConfig
    distr_output: Output
    scaling: str
    patch_sizes: Tuple[int, ...]
    num_experts: int
    expert: str
    individual: bool
    moving_average: int
    hidden_dimension: int
    dropout: float
    router: str
    router_hidden_dimension: int
    top_k: Optional[int]
    noisy_routing: bool
    head_dropout: float
    covariate_hidden_dimension: int
    backend: str

    def __post_init__(self) -> None:
        if self.expert not in EXPERTS:
            raise ValueError(
                f"expert={self.expert!r} is unknown: choose one of {', '.join(EXPERTS)}"
            )
        if self.router not in ROUTERS:
            raise ValueError(
                f"router={self.router!r} is unknown: choose one of {', '.join(ROUTERS)}"
            )
        if not 1 <= self.num_experts <= 16:
            raise ValueError(f"num_experts={self.num_experts} must lie between 1 and 16")
        check_routing(self.num_experts, self.top_k, self.head_dropout)
        if self.noisy_routing and self.top_k is None:
            raise ValueError("noisy_routing=True needs top_k: noise explores among chosen experts")
        for name in (
            "moving_average",
            "hidden_dimension",
            "router_hidden_dimension",
            "covariate_hidden_dimension",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if self.router == "calendar" and not time_features(self.window.freq):
            raise ValueError(
                f"router='calendar' reads time features, of which freq={self.window.freq!r} has "
                "none: use router='window' or 'statistics'"
            )
