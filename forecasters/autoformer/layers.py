"""The Autoformer's parts (Wu et al. 2021, arXiv 2106.13008), with experts.

Shape suffixes: B series, T tokens, D features, A heads, K delays kept, W steps of the moving
average.
"""

import math
from typing import Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...backends import Backend
from ..moe import GatedExperts, LinearRouter, Routing, routed_experts
from .circular import circular_convolution, circular_correlation
from .config import AutoformerConfig


class AutoCorrelation(nn.Module):
    """Attention over delays instead of tokens (section 3.2).

    Each head finds the ``delay_factor * ln T`` delays of largest correlation and adds up the
    memory's values, moved by them, weighted by a softmax over the correlations. Moving by weighted
    delays is one product with the spectrum of the weights, so all of it takes O(T log T).

    A correlation is the mean over time of the product of attention, which does not depend on the
    length, times a learned sharpness.

    Parameters
    ----------
    d_model, num_heads
        Features, and heads which share them.
    delay_factor
        Delays kept per head are this times ln T, at least two.
    """

    def __init__(self, d_model: int, num_heads: int, delay_factor: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.delay_factor = delay_factor
        # Without padding a bias favours no delay; with it, those at which the two overlap most.
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.output = nn.Linear(d_model, d_model)
        self.log_sharpness = nn.Parameter(torch.zeros(num_heads))

    def forward(self, query_BTD: Tensor, memory_BTD: Tensor, length: int) -> Tensor:
        """``[B, T, D]`` for a query and a memory on a time axis of ``length`` tokens.

        Delays are circular, so that it makes no difference where on that axis the query begins.
        """
        query = self._pad_and_split_heads(self.query(query_BTD), length)
        key = self._pad_and_split_heads(self.key(memory_BTD), length)
        value = self._pad_and_split_heads(self.value(memory_BTD), length)
        weights_BTA = self._weights_of_delays(self.correlation(query, key))
        moved = circular_convolution(weights_BTA, value)[:, : query_BTD.shape[1]]
        return self.output(moved.flatten(2).to(value.dtype))

    def correlation(self, query_BTAD: Tensor, key_BTAD: Tensor) -> Tensor:
        """The mean over time of attention's product, the key moved by each delay ``[B, T, A]``."""
        length, features = query_BTAD.shape[1], query_BTAD.shape[-1]
        return circular_correlation(query_BTAD, key_BTAD) / (length * math.sqrt(features))

    def _pad_and_split_heads(self, x_BTD: Tensor, length: int) -> Tensor:
        """Zeros put behind the last token, and the heads apart ``[B, T, A, D / A]``."""
        if x_BTD.shape[1] < length:
            x_BTD = F.pad(x_BTD, (0, 0, 0, length - x_BTD.shape[1]))
        return x_BTD.unflatten(-1, (self.num_heads, -1))

    def _weights_of_delays(self, correlation_BTA: Tensor) -> Tensor:
        """A weight for each delay ``[B, T, A]``, 0 for those not kept."""
        length = correlation_BTA.shape[1]
        # The weight of a single delay would be 1, without a gradient.
        kept = min(length, max(2, int(self.delay_factor * math.log(length))))
        best_BKA, delays_BKA = correlation_BTA.topk(kept, dim=1)
        weights_BKA = (best_BKA * self.log_sharpness.exp()).softmax(dim=1)
        return torch.zeros_like(correlation_BTA).scatter(1, delays_BKA, weights_BKA)


class SeriesDecomposition(nn.Module):
    """A sequence as its moving average, the trend, and what is left of it (section 3.1).

    The average's weights are learned. Its width for a series is a learned function of how much that
    series changes from token to token.

    Parameters
    ----------
    num_features
        Features of a token, D.
    moving_average
        The largest width, W, an odd number of tokens.
    """

    offsets: Tensor

    def __init__(self, num_features: int, moving_average: int) -> None:
        super().__init__()
        self.max_reach = moving_average // 2
        self.log_weights = nn.Parameter(torch.zeros(moving_average))
        self.width = nn.Linear(num_features, 1)
        nn.init.zeros_(self.width.weight)
        nn.init.zeros_(self.width.bias)
        offsets = torch.arange(-self.max_reach, self.max_reach + 1).abs()
        self.register_buffer("offsets", offsets.float(), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tuple[Tensor, Tensor]:
        """Remainder and trend, both ``[B, T, D]``; beyond the ends, the end is repeated."""
        # A series is a channel of its own: one convolution with as many groups as series.
        ends = (0, 0, self.max_reach, self.max_reach)
        extended = F.pad(x_BTD.unsqueeze(0), ends, mode="replicate")
        kernels = self.kernels(x_BTD)[:, None, :, None]
        trend = F.conv2d(extended, kernels, groups=len(x_BTD)).squeeze(0)
        return x_BTD - trend, trend

    def kernels(self, x_BTD: Tensor) -> Tensor:
        """The weights of each series' moving average ``[B, W]``, which sum to 1."""
        # How rough a series is, is taken as given: this saves a fifth of the backward pass.
        x_BTD = x_BTD.detach()
        changes_BD = x_BTD.diff(dim=1).abs().sum(dim=1) / max(1, x_BTD.shape[1] - 1)
        reach_B1 = self.max_reach * torch.sigmoid(self.width(changes_BD))
        # Weights fade smoothly where their offset passes the reach, so that both have a gradient.
        return (self.log_weights + F.logsigmoid(1.0 + reach_B1 - self.offsets)).softmax(dim=-1)


class MixtureFeedForward(nn.Module):
    """A gated feed-forward, or several of which each token is sent through the best."""

    def __init__(self, config: AutoformerConfig, backend: Backend) -> None:
        super().__init__()
        self.router: Optional[LinearRouter] = None
        if config.num_experts > 1:
            self.router = LinearRouter(
                config.d_model, config.num_experts, config.top_k, backend=backend
            )
        self.experts = GatedExperts(
            config.num_experts, config.d_model, config.d_ff, backend=backend
        )

    def forward(self, x_BTD: Tensor) -> Tuple[Tensor, Optional[Routing]]:
        """``[B, T, D]``, and what the router decided, if there is one."""
        if self.router is None:
            return self.experts(x_BTD), None
        return routed_experts(x_BTD, self.router, self.experts)


class SequenceDropout(nn.Module):
    """Drops a feature of a sequence for all of its tokens (Gal & Ghahramani 2016)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x_BTD: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x_BTD
        return x_BTD * F.dropout(torch.ones_like(x_BTD[:, :1]), self.probability)


class Layer(nn.Module):
    """Auto-correlation with itself, in a decoder also with the encoder, and a feed-forward.

    Each stands behind a norm and beside a skip connection, and is followed by a decomposition
    that keeps the remainder.

    Parameters
    ----------
    config
        The network's settings.
    backend
        Computes routers and experts.
    reads_memory
        Whether it is a decoder's.
    """

    def __init__(self, config: AutoformerConfig, backend: Backend, reads_memory: bool) -> None:
        super().__init__()
        width = config.d_model
        self.self_correlation = auto_correlation(config)
        self.cross_correlation = auto_correlation(config) if reads_memory else None
        self.feed_forward = MixtureFeedForward(config, backend)
        parts = 3 if reads_memory else 2
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(parts))
        self.decompositions = nn.ModuleList(
            SeriesDecomposition(width, config.moving_average)
            for _ in range(parts if config.decomposition == "layers" else 0)
        )
        self.dropout = SequenceDropout(config.dropout)

    def forward(
        self,
        x_BTD: Tensor,
        memory_BTD: Optional[Tensor] = None,
        length: int = 0,
        num_read: Optional[int] = None,
    ) -> Tuple[Tensor, Optional[Tensor], Optional[Routing]]:
        """One layer.

        Parameters
        ----------
        x_BTD
            ``[B, T, D]``.
        memory_BTD, length
            For a decoder: what the encoder says, ``[B, tokens, D]``, and the length of the time
            axis that both lie on.
        num_read
            How many of the last tokens are read; where layers are not decomposed, the others are
            left out of the feed-forward and of what is returned.

        Returns
        -------
        remainder, trend, routing
            Twice ``[B, T, D]``, the trend being the sum of those taken out, if they are; and
            what the router decided, if there is one.
        """
        trends = []
        for i, norm in enumerate(self.norms):
            # A decomposition would read the tokens before, too.
            if num_read and i + 1 == len(self.norms) and not self.decompositions:
                x_BTD = x_BTD[:, -num_read:]
            normed, routing = norm(x_BTD), None
            if i == 0:
                change = self.self_correlation(normed, normed, x_BTD.shape[1])
            elif i + 1 < len(self.norms):
                assert self.cross_correlation is not None
                assert memory_BTD is not None
                change = self.cross_correlation(normed, memory_BTD, length)
            else:
                change, routing = self.feed_forward(normed)
            x_BTD = x_BTD + self.dropout(change)
            if self.decompositions:
                x_BTD, trend = self.decompositions[i](x_BTD)
                trends.append(trend)
        # An encoder's trends go nowhere.
        trend = (
            torch.stack(trends).sum(dim=0)
            if trends and self.cross_correlation is not None
            else None
        )
        return x_BTD, trend, routing


def auto_correlation(config: AutoformerConfig) -> AutoCorrelation:
    """An auto-correlation of a network's settings."""
    return AutoCorrelation(config.d_model, config.num_heads, config.delay_factor)
