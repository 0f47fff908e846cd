"""MoLE: a mixture of linear experts (Ni et al. 2024)."""

from .config import EXPERTS, ROUTERS, MoLEConfig
from .estimator import MoLEEstimator, MoLEPredictor
from .network import MoLENetwork

__all__ = [
    "EXPERTS",
    "ROUTERS",
    "MoLEConfig",
    "MoLEEstimator",
    "MoLENetwork",
    "MoLEPredictor",
]
