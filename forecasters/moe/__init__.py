"""The mixture-of-experts core that all models share: routers, expert banks, balance."""

from .balance import ExpertUsage, balance_loss, total_balance_loss, window_shares
from .experts import GatedExperts, LinearExperts, ResidualMLPExperts
from .routed import routed_experts
from .routers import CentroidRouter, LinearRouter, MLPRouter, Router, Routing, check_routing

__all__ = [
    "CentroidRouter",
    "ExpertUsage",
    "GatedExperts",
    "LinearExperts",
    "LinearRouter",
    "MLPRouter",
    "ResidualMLPExperts",
    "Router",
    "Routing",
    "balance_loss",
    "check_routing",
    "routed_experts",
    "total_balance_loss",
    "window_shares",
]
