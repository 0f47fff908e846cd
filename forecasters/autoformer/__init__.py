"""A hierarchical Autoformer with experts: wavelets over auto-correlation (after Wu et al. 2021)."""

from .config import AutoformerConfig
from .estimator import HierarchicalAutoformerEstimator, HierarchicalAutoformerPredictor
from .network import AutoformerNetwork

__all__ = [
    "AutoformerConfig",
    "AutoformerNetwork",
    "HierarchicalAutoformerEstimator",
    "HierarchicalAutoformerPredictor",
]
