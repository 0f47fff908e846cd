"""Which experts see which token, and how much of each.

Shape suffixes: T tokens, E experts, K experts chosen per token, F router features.
"""

from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...backends import Backend, Scoring, TorchBackend


class Routing(NamedTuple):
    """One router's decision for a batch of tokens.

    Attributes
    ----------
    weights_TK
        Mixture weights of the chosen experts. Each token's sum to 1, unless the router was told
        to weight them by their scores.
    ids_TK
        Indices of the chosen experts; 0 to E - 1 in order where all are.
    scores_TE
        Softmax over all experts, before any was left out.
    counted_T
        Which tokens count in balance and usage, which padding does not; ``None`` if all do.
    """

    weights_TK: Tensor
    ids_TK: Tensor
    scores_TE: Tensor
    counted_T: Optional[Tensor] = None

    @property
    def num_experts(self) -> int:
        return self.scores_TE.shape[-1]

    @property
    def is_sparse(self) -> bool:
        return self.ids_TK.shape[-1] < self.num_experts

    def dense_weights(self) -> Tensor:
        """Mixture weights of all experts ``[T, E]``; 0 for those not chosen."""
        if not self.is_sparse:
            return self.weights_TK
        return torch.zeros_like(self.scores_TE).scatter(-1, self.ids_TK, self.weights_TK)


class Router(nn.Module):
    """Base of the routers: a subclass scores the experts, this class chooses among them.

    Parameters
    ----------
    num_experts
        Number of experts E.
    top_k
        Experts kept per token; ``None`` keeps all (a dense mixture).
    head_dropout
        Probability, in training, that an expert's logit is masked before the softmax
        (Ni et al. 2024, section 4.4). A token never loses all its experts.
    weighted_by_score
        Whether a chosen expert weighs what it has of the softmax over all of them (Fedus et al.
        2022, equation 2), so that the choice of a single one has a gradient. Otherwise the
        weights of the chosen sum to 1.
    backend
        Computes the choice; torch by default.

    Raises
    ------
    ValueError
        If ``top_k`` is not between 1 and ``num_experts``, or ``head_dropout`` not in [0, 1).
    """

    def __init__(
        self,
        num_experts: int,
        top_k: Optional[int] = None,
        head_dropout: float = 0.0,
        weighted_by_score: bool = False,
        backend: Optional[Backend] = None,
    ) -> None:
        super().__init__()
        check_routing(num_experts, top_k, head_dropout)
        self.num_experts = num_experts
        self.top_k = top_k or num_experts
        self.head_dropout = head_dropout
        self.weighted_by_score = weighted_by_score
        self.backend: Backend = backend or TorchBackend()

    def logits(self, features_TF: Tensor) -> Tensor:
        """Score of every expert ``[T, E]``, larger is better."""
        raise NotImplementedError

    @property
    def scoring(self) -> Optional[Scoring]:
        """How the experts are scored, if that takes a single matrix."""
        return None

    def keep(self, experts: Sequence[int]) -> None:
        """Choose among these experts only, which are numbered from 0 on."""
        self.num_experts = len(experts)
        self.top_k = min(self.top_k, len(experts))

    def exploration(self, features_TF: Tensor, logits_TE: Tensor) -> Tensor:
        """Logits that the choice is made on in training; by default the logits themselves."""
        return logits_TE

    def forward(self, features_TF: Tensor) -> Routing:
        logits_TE = self.logits(features_TF)
        scores_TE = logits_TE.softmax(dim=-1)
        if self.training:
            logits_TE = self._drop_heads(self.exploration(features_TF, logits_TE))
        weights_TK, ids_TK = self.backend.route(logits_TE, self.top_k)
        if self.weighted_by_score:
            weights_TK = scores_TE.gather(-1, ids_TK)
        return Routing(weights_TK, ids_TK, scores_TE)

    def _drop_heads(self, logits_TE: Tensor) -> Tensor:
        if self.head_dropout == 0.0:
            return logits_TE
        dropped = torch.rand_like(logits_TE) < self.head_dropout
        dropped &= ~dropped.all(dim=-1, keepdim=True)
        return logits_TE.masked_fill(dropped, float("-inf"))


class LinearRouter(Router):
    """One linear layer, its choice weighted by its score (Fedus et al. 2022, section 2.1).

    Parameters
    ----------
    in_features
        Number of features of a token, F.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        top_k: Optional[int] = None,
        head_dropout: float = 0.0,
        backend: Optional[Backend] = None,
    ) -> None:
        super().__init__(num_experts, top_k, head_dropout, weighted_by_score=True, backend=backend)
        self.output = nn.Linear(in_features, num_experts, bias=False)

    def keep(self, experts: Sequence[int]) -> None:
        super().keep(experts)
        _keep_outputs(self.output, experts)

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.output.weight, by_distance=False, weighted_by_score=True)

    def logits(self, features_TF: Tensor) -> Tensor:
        return self.scoring.logits(features_TF)


class MLPRouter(Router):
    """Two linear layers with a ReLU between them (Ni et al. 2024, section 3.2).

    Parameters
    ----------
    in_features
        Number of router features F.
    hidden_features
        Width of the hidden layer.
    noisy
        Add Gaussian noise of learned, per-token size to the logits in training
        (Shazeer et al. 2017, equation 4).
    num_channels
        If given, the features are common to all channels ``[…, F]`` and every channel gets
        logits of its own ``[…, C, E]``.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        num_experts: int,
        top_k: Optional[int] = None,
        noisy: bool = False,
        head_dropout: float = 0.0,
        num_channels: Optional[int] = None,
        backend: Optional[Backend] = None,
    ) -> None:
        super().__init__(num_experts, top_k, head_dropout, backend=backend)
        self.num_channels = num_channels
        num_logits = num_experts * (num_channels or 1)
        self.hidden = nn.Linear(in_features, hidden_features)
        self.output = nn.Linear(hidden_features, num_logits)
        self.noise = nn.Linear(in_features, num_logits) if noisy else None

    def keep(self, experts: Sequence[int]) -> None:
        channels = range(self.num_channels or 1)
        logits = [channel * self.num_experts + expert for channel in channels for expert in experts]
        for layer in (self.output, self.noise):
            if layer is not None:
                _keep_outputs(layer, logits)
        super().keep(experts)

    def logits(self, features_TF: Tensor) -> Tensor:
        return self._by_channel(self.output(F.relu(self.hidden(features_TF))))

    def exploration(self, features_TF: Tensor, logits_TE: Tensor) -> Tensor:
        if self.noise is None:
            return logits_TE
        noise_TE = F.softplus(self._by_channel(self.noise(features_TF)))
        return logits_TE + torch.randn_like(logits_TE) * noise_TE

    def _by_channel(self, values: Tensor) -> Tensor:
        if self.num_channels is None:
            return values
        return values.unflatten(-1, (self.num_channels, self.num_experts))


class CentroidRouter(Router):
    """Scores experts by the distance of a token to their centroids, the farthest highest.

    MOIRAI-MoE (Liu et al. 2024, section 3.2.2) means the nearest, but its published weights were
    trained with the farthest, which is therefore what a router here does.

    Parameters
    ----------
    in_features
        Number of features of a token, F.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        top_k: Optional[int] = None,
        head_dropout: float = 0.0,
        backend: Optional[Backend] = None,
    ) -> None:
        super().__init__(num_experts, top_k, head_dropout, backend=backend)
        # Double precision, as published, so that reading and writing changes nothing.
        centroids = torch.randn(num_experts, in_features, dtype=torch.float64)
        self.centroids_EF = nn.Parameter(centroids)

    def keep(self, experts: Sequence[int]) -> None:
        super().keep(experts)
        centroids = self.centroids_EF.detach()[list(experts)]
        self.centroids_EF = nn.Parameter(centroids, self.centroids_EF.requires_grad)

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.centroids_EF, by_distance=True, weighted_by_score=False)

    def logits(self, features_TF: Tensor) -> Tensor:
        return self.scoring.logits(features_TF)


def _keep_outputs(layer: nn.Linear, outputs: Sequence[int]) -> None:
    """Drop all outputs of a linear layer but these."""
    rows = list(outputs)
    layer.weight = nn.Parameter(layer.weight.detach()[rows], layer.weight.requires_grad)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[rows], layer.bias.requires_grad)
    layer.out_features = len(rows)


def check_routing(num_experts: int, top_k: Optional[int], head_dropout: float) -> None:
    """Refuse routing settings that cannot work.

    Raises
    ------
    ValueError
        See :class:`Router`.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts} must be at least 1")
    if top_k is not None and not 1 <= top_k <= num_experts:
        raise ValueError(
            f"top_k={top_k} must lie between 1 and num_experts={num_experts}; "
            "leave it out to mix all experts"
        )
    if not 0.0 <= head_dropout < 1.0:
        raise ValueError(f"head_dropout={head_dropout} must lie in [0, 1)")
