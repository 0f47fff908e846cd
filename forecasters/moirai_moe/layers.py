"""The transformer layers of MOIRAI-MoE.

Shape suffixes: B series, S tokens of the context, Q tokens that attend, D features, N heads,
H features of a head, M samples, V variates of one time step, G tokens since the context, E
experts.
"""

from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...backends import Backend
from ..moe import CentroidRouter, GatedExperts, Routing, routed_experts
from .config import MoiraiMoEConfig

_NORM_EPSILON = 1e-5
_ROTATION_BASE = 10_000.0

KeysAndValues = Tuple[Tensor, Tensor]


class Visibility(NamedTuple):
    """Which tokens see which.

    Attributes
    ----------
    allowed
        ``[B or 1, 1, Q, S]``, true where a query may attend; ``None`` if all earlier tokens may.
    same_variate
        ``[Q, S]``; ``None`` if there is one variate only.
    """

    allowed: Optional[Tensor]
    same_variate: Optional[Tensor]


class RMSNorm(nn.RMSNorm):
    """Root mean square normalisation of the last dimension.

    On the CPU torch's goes over the numbers six times, this one three times.
    """

    def __init__(self, features: int) -> None:
        super().__init__(features, eps=_NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return super().forward(x)
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
        return (x * torch.rsqrt(mean_square + _NORM_EPSILON)).mul_(self.weight)


class Rotation(NamedTuple):
    """By which positions turn pairs of features.

    Attributes
    ----------
    phases
        Complex numbers of modulus 1, ``[…, H / 4]``.
    """

    phases: Tensor

    @classmethod
    def of_positions(cls, positions: Tensor, head_features: int) -> "Rotation":
        pairs = head_features // 4
        exponents = torch.arange(pairs, device=positions.device, dtype=torch.float32) / pairs
        angles = positions.unsqueeze(-1) * _ROTATION_BASE**-exponents
        return cls(torch.polar(torch.ones_like(angles), angles))

    def turn(self, x: Tensor) -> Tensor:
        """Turn neighbouring pairs in the first half of the last dimension (Su et al. 2021).

        The tensor may be overwritten.
        """
        # No complex number consists of two bfloat16.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        turned = wide[..., : wide.shape[-1] // 2]
        torch.view_as_complex(turned.unflatten(-1, (-1, 2))).mul_(self.phases)
        return wide.to(x.dtype)


class Attention(nn.Module):
    """Attention with normalised queries and keys, and a bias for tokens of the same variate."""

    def __init__(self, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_key_value = nn.Linear(d_model, 3 * d_model, bias=False)
        self.query_norm = RMSNorm(d_model // num_heads)
        self.key_norm = RMSNorm(d_model // num_heads)
        # What is added to the logits of other variates, and of the same.
        self.variate_bias = nn.Parameter(torch.randn(2, num_heads))
        self.output = nn.Linear(d_model, d_model, bias=False)

    def project(self, x: Tensor, rotation: Rotation) -> Tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[…, N, H]`` of ``[…, D]``."""
        projected = self.query_key_value(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = projected.unbind(dim=-3)
        return rotation.turn(self.query_norm(query)), rotation.turn(self.key_norm(key)), value

    def bias(self, same_variate: Tensor) -> Tensor:
        """``[N, Q, S]`` from ``[Q, S]``."""
        other, same = self.variate_bias[:, :, None, None]
        return torch.where(same_variate, same, other)

    def forward(
        self, x_BSD: Tensor, rotation: Rotation, visibility: Visibility, last: Optional[int] = None
    ) -> Tuple[Tensor, KeysAndValues]:
        """Attend, and give the keys and values ``[B, N, S, H]`` along.

        Parameters
        ----------
        last
            Number of tokens at the end to compute the result of; ``None`` for all.
        """
        query, key, value = (
            projected.transpose(1, 2) for projected in self.project(x_BSD, rotation)
        )
        if last is not None:
            query = query[:, :, -last:]
        mask = visibility.allowed
        if visibility.same_variate is not None:
            bias = self.bias(visibility.same_variate).unsqueeze(0)
            mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and last is None,
        )
        return self.output(attended.transpose(1, 2).flatten(-2)), (key, value)

    def step(
        self,
        x_BMVD: Tensor,
        rotation: Rotation,
        context: KeysAndValues,
        visibility: Visibility,
        generated: KeysAndValues,
    ) -> Tensor:
        """Attend from the tokens of one time step, of many samples, to all before and to it.

        Parameters
        ----------
        context
            Keys and values ``[B, N, S, H]`` that a series' samples share.
        generated
            Keys and values ``[B, M, N, G, H]`` of the steps since, of which those of this step,
            the last, are yet to be written.
        """
        query, key, value = (
            projected.transpose(2, 3) for projected in self.project(x_BMVD, rotation)
        )
        _, samples, _, variates, features = query.shape
        context_keys, context_values = context
        keys, values = generated
        keys[..., -variates:, :] = key
        values[..., -variates:, :] = value
        # All samples of a series are queries of one product with its context.
        query = query.mul_(features**-0.5)
        shared = query.transpose(1, 2).flatten(2, 3) @ context_keys.transpose(-1, -2)
        logits_context = shared.unflatten(2, (samples, variates)).transpose(1, 2)
        logits_generated = query @ keys.transpose(-1, -2)
        if visibility.same_variate is not None:
            bias = self.bias(visibility.same_variate)
            logits_context = logits_context + bias[..., : context_keys.shape[-2]]
            recent = torch.eye(variates, dtype=torch.bool, device=bias.device)
            steps = keys.shape[-2] // variates
            logits_generated = logits_generated + self.bias(recent.repeat(1, steps))
        if visibility.allowed is not None:
            logits_context = logits_context.masked_fill(
                ~visibility.allowed.unsqueeze(1), -torch.inf
            )
        weights = torch.cat([logits_context, logits_generated], dim=-1).softmax(dim=-1)
        of_context, of_generated = weights.split([context_keys.shape[-2], keys.shape[-2]], dim=-1)
        shared = of_context.transpose(1, 2).flatten(2, 3) @ context_values
        attended = _weighted_sums(of_generated, values)
        attended += shared.unflatten(2, (samples, variates)).transpose(1, 2)
        return self.output(attended.transpose(2, 3).flatten(-2))


def _weighted_sums(weights: Tensor, values: Tensor) -> Tensor:
    """``[…, Q, H]``, the products of ``[…, Q, G]`` and ``[…, G, H]``."""
    if weights.is_cuda or weights.shape[-2] > 1:
        return weights @ values
    # Of thousands of products of a single row each, the CPU adds up the rows three times as fast.
    total = weights[..., :1] * values[..., :1, :]
    for row in range(1, values.shape[-2]):
        total.addcmul_(weights[..., row : row + 1], values[..., row : row + 1, :])
    return total


class TransformerLayer(nn.Module):
    """Attention and experts, each behind a norm and beside a skip connection."""

    def __init__(self, config: MoiraiMoEConfig, backend: Backend) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model)
        self.attention = Attention(config.d_model, config.num_heads, config.attention_dropout)
        self.experts_norm = RMSNorm(config.d_model)
        self.router = CentroidRouter(
            config.d_model, config.num_experts, config.top_k, backend=backend
        )
        self.experts = GatedExperts(
            config.num_experts, config.d_model, config.d_ff, config.dropout, backend
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BSD: Tensor, rotation: Rotation, visibility: Visibility, last: Optional[int] = None
    ) -> Tuple[Tensor, Routing, KeysAndValues]:
        """The tokens' new features, how they were routed, and their keys and values."""
        attended, cache = self.attention(self.attention_norm(x_BSD), rotation, visibility, last)
        x = (x_BSD if last is None else x_BSD[:, -last:]) + self.dropout(attended)
        mixed, routing = self._feed_forward(x)
        return mixed, routing, cache

    def step(
        self,
        x_BMVD: Tensor,
        rotation: Rotation,
        context: KeysAndValues,
        visibility: Visibility,
        generated: KeysAndValues,
    ) -> Tensor:
        """The new features of one time step; see :meth:`Attention.step`."""
        normed = self.attention_norm(x_BMVD)
        attended = self.attention.step(normed, rotation, context, visibility, generated)
        return self._feed_forward(x_BMVD + attended)[0]

    def _feed_forward(self, x: Tensor) -> Tuple[Tensor, Routing]:
        mixed, routing = routed_experts(self.experts_norm(x), self.router, self.experts)
        return x + mixed, routing
