"""Mixture-of-experts forecasters, each a GluonTS Estimator and Predictor."""

from .calibration import Calibration
from .estimator import MoEEstimator
from .moirai_moe import MoiraiMoEEstimator, MoiraiMoEPredictor
from .mole import MoLEEstimator, MoLEPredictor
from .predictor import MoEPredictor

__all__ = [
    "Calibration",
    "MoEEstimator",
    "MoEPredictor",
    "MoLEEstimator",
    "MoLEPredictor",
    "MoiraiMoEEstimator",
    "MoiraiMoEPredictor",
]
