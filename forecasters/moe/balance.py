"""Balance losses and expert usage: pure functions of what the routers decided."""

from typing import Dict, Mapping

import numpy as np
import torch
from torch import Tensor

from .routers import Routing


def balance_loss(routing: Routing) -> Tensor:
    """Load-balancing loss ``E · Σₑ fₑ · pₑ`` (Fedus et al. 2022, equation 4).

    ``fₑ`` is the share of choices that fell on expert e and ``pₑ`` its mean score. The loss is 1
    under uniform routing and E when one expert takes everything. Gradients flow through ``pₑ``.
    Padding counts for neither.

    Returns
    -------
    Tensor
        A scalar.
    """
    num_experts, (_, ids_TK, scores_TE, _) = routing.num_experts, _without_padding(routing)
    choices = torch.bincount(ids_TK.flatten(), minlength=num_experts)
    share_E = choices.to(scores_TE.dtype) / ids_TK.numel()
    return num_experts * (share_E * scores_TE.mean(dim=0)).sum()


def total_balance_loss(routings: Mapping[str, Routing]) -> Tensor:
    """Sum of :func:`balance_loss` over the sparse routers; 0 where all mixtures are dense."""
    sparse = [balance_loss(routing) for routing in routings.values() if routing.is_sparse]
    return torch.stack(sparse).sum() if sparse else torch.zeros(())


def window_shares(routings: Mapping[str, Routing]) -> Dict[str, Tensor]:
    """Mean share of each expert in the mixtures of each window ``[batch, E]``, by router.

    The mean is over the window's tokens and channels, without padding; each row sums to 1.
    """
    return {name: _mean_shares(routing) for name, routing in routings.items()}


def _mean_shares(routing: Routing) -> Tensor:
    shares_BTE = _shares(routing).unsqueeze(1).flatten(1, -2)
    if routing.counted_T is None:
        return shares_BTE.mean(dim=1)
    counted = routing.counted_T.flatten(1).unsqueeze(-1).to(shares_BTE.dtype)
    return (shares_BTE * counted).sum(dim=1) / counted.sum(dim=1)


def _shares(routing: Routing) -> Tensor:
    """What part of its mixture each expert is, for every token ``[T, E]``."""
    weights_TE = routing.dense_weights().detach()
    return weights_TE / weights_TE.sum(dim=-1, keepdim=True)


def _without_padding(routing: Routing) -> Routing:
    """The decisions on the tokens that count, of which T is then the only dimension."""
    decisions = tuple(part.flatten(0, -2) for part in routing[:3])
    if routing.counted_T is not None:
        counted = routing.counted_T.flatten().nonzero().squeeze(1)
        decisions = tuple(part.index_select(0, counted) for part in decisions)
    return Routing(*decisions)


class ExpertUsage:
    """How much each expert of each router was used, summed over the batches it was shown.

    Examples
    --------
    >>> usage = ExpertUsage()
    >>> usage.update({"router": routing})  # doctest: +SKIP
    >>> usage.weight_share["router"]  # doctest: +SKIP
    array([0.7, 0.3])
    """

    def __init__(self) -> None:
        self._weight: Dict[str, Tensor] = {}
        self._chosen: Dict[str, Tensor] = {}
        self._tokens: Dict[str, int] = {}

    def update(self, routings: Mapping[str, Routing]) -> None:
        """Add one batch of every router's decisions."""
        for name, padded in routings.items():
            routing = _without_padding(padded)
            share_TE = _shares(routing)
            weight_E = share_TE.sum(dim=0).double().cpu()
            chosen_E = torch.bincount(routing.ids_TK.flatten(), minlength=routing.num_experts).cpu()
            self._weight[name] = self._weight.get(name, 0) + weight_E
            self._chosen[name] = self._chosen.get(name, 0) + chosen_E
            self._tokens[name] = self._tokens.get(name, 0) + len(share_TE)

    @property
    def weight_share(self) -> Dict[str, np.ndarray]:
        """Mean share of each expert in the mixture ``[E]``, by router; each sums to 1."""
        return {name: (w / self._tokens[name]).numpy() for name, w in self._weight.items()}

    @property
    def chosen_share(self) -> Dict[str, np.ndarray]:
        """Share of tokens that chose each expert ``[E]``, by router; each sums to top_k."""
        return {name: (c.double() / self._tokens[name]).numpy() for name, c in self._chosen.items()}
