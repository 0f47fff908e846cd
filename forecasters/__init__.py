"""Mixture-of-experts forecasters, each a GluonTS Estimator and Predictor."""

from .autoformer import HierarchicalAutoformerEstimator, HierarchicalAutoformerPredictor
from .calibration import Calibration
from .estimator import MoEEstimator
from .moirai_moe import MoiraiMoEEstimator, MoiraiMoEPredictor
from .mole import MoLEEstimator, MoLEPredictor
from .predictor import MoEPredictor
from .pruning import prune_experts

__all__ = [
    "Calibration",
    "HierarchicalAutoformerEstimator",
    "HierarchicalAutoformerPredictor",
    "MoEEstimator",
    "MoEPredictor",
    "MoLEEstimator",
    "MoLEPredictor",
    "MoiraiMoEEstimator",
    "MoiraiMoEPredictor",
    "prune_experts",
]
