"""What a backend is given and what it gives back, where several steps are one.

Shape suffixes: T tokens, E experts, K experts chosen per token, I and O input and output features
of an expert, G groups that have weights of their own (or 1 for all), F inputs, R and H units of
the hidden layer of a router and of an expert.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import functional as F


class Scoring(NamedTuple):
    """How a router of a single matrix scores experts.

    Attributes
    ----------
    weight_EI
        A row for each expert.
    by_distance
        Whether an expert's score is the distance of the token to its row, instead of the product
        with it.
    weighted_by_score
        Whether a chosen expert weighs its share of the softmax over all experts; otherwise the
        weights of the chosen sum to 1.
    """

    weight_EI: Tensor
    by_distance: bool
    weighted_by_score: bool

    def logits(self, x_TI: Tensor) -> Tensor:
        """``[…, E]`` for ``[…, I]``."""
        if not self.by_distance:
            return F.linear(x_TI, self.weight_EI)
        rows = x_TI.reshape(-1, x_TI.shape[-1])
        # By a product, as torch has it by default, the distances of a token take twice as long.
        mode = "use_mm_for_euclid_dist_if_necessary"
        if len(rows) == 1 and not rows.is_cuda:
            mode = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(rows, self.weight_EI.to(x_TI.dtype), compute_mode=mode)
        return distances.view(*x_TI.shape[:-1], -1)


class Mixed(NamedTuple):
    """Mixed outputs of experts, and how they were chosen.

    Attributes
    ----------
    y_TO
        The outputs.
    weights_TK, ids_TK
        Weights and numbers of the chosen experts.
    scores_TE
        Softmax over all experts.
    """

    y_TO: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    scores_TE: Tensor


class LinearMixture(NamedTuple):
    """A network of linear experts under a router as a few matrices.

    A token x, the last number of which is 1, becomes ``Σₑ wₑ (x Dₑ + ReLU(x Uₑ) Cₑ)`` with
    ``w = softmax(ReLU(x A) B)``, of which the largest are kept. All biases stand in the last rows.

    Attributes
    ----------
    router_hidden_GFR, router_output_GRE
        A and B; ``None`` if there is one expert.
    direct_GEFO
        D.
    hidden_GEFH, contract_GEHO
        U and C, or ``None``.
    """

    router_hidden_GFR: Optional[Tensor]
    router_output_GRE: Optional[Tensor]
    direct_GEFO: Tensor
    hidden_GEFH: Optional[Tensor]
    contract_GEHO: Optional[Tensor]
