"""MOIRAI-MoE: a pretrained transformer over patches with sparse experts."""

from .config import MoiraiMoEConfig
from .estimator import MoiraiMoEEstimator
from .network import MoiraiMoENetwork
from .predictor import MoiraiMoEPredictor, network_from_uni2ts, network_to_uni2ts

__all__ = [
    "MoiraiMoEConfig",
    "MoiraiMoEEstimator",
    "MoiraiMoENetwork",
    "MoiraiMoEPredictor",
    "network_from_uni2ts",
    "network_to_uni2ts",
]
