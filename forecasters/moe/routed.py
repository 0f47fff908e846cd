"""Routers and gated experts in one step, which a device takes without coming back between."""

from typing import Tuple

from torch import Tensor

from .experts import GatedExperts
from .routers import Router, Routing


def routed_experts(x_TI: Tensor, router: Router, experts: GatedExperts) -> Tuple[Tensor, Routing]:
    """Send tokens through the experts that a router chooses.

    Parameters
    ----------
    x_TI
        ``[…, I]``.
    router, experts
        Who chooses, and who is chosen.

    Returns
    -------
    y_TI, routing
        ``[…, I]``, and what the router decided.
    """
    scoring = router.scoring
    if scoring is None or router.training:
        # What explores or drops in training decides between the scores and the choice.
        routing = router(x_TI)
        return experts(x_TI, routing), routing
    mixed = experts.backend.routed_ffn(
        x_TI.flatten(0, -2), scoring, router.top_k, experts.expand, experts.contract
    )
    y_TI, *decided = (part.unflatten(0, x_TI.shape[:-1]) for part in mixed)
    return y_TI, Routing(*decided)
