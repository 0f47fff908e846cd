"""Expert weights in stacked tensors, computed through a backend.

Shape suffixes: E experts, T tokens, I and O input and output features of an expert. ``*`` is
nothing, or a channel dimension where every channel has weights of its own.
"""

import math
from typing import Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...backends import Backend, TorchBackend
from .routers import Routing


class LinearExperts(nn.Module):
    """E linear maps in one ``[*, E, I, O]`` tensor.

    Parameters
    ----------
    num_experts, in_features, out_features
        E, I and O.
    num_channels
        ``None`` for weights shared by all channels, or the number of channels that each have
        their own.
    backend
        Computes the products; torch by default.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        num_channels: Optional[int] = None,
        backend: Optional[Backend] = None,
    ) -> None:
        super().__init__()
        groups = () if num_channels is None else (num_channels,)
        self.weight = nn.Parameter(torch.empty(*groups, num_experts, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(*groups, num_experts, out_features))
        self.num_experts = num_experts
        self.backend: Backend = backend or TorchBackend()
        bound = 1.0 / math.sqrt(in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Every expert's output ``[*, E, T, O]`` for ``[*, T, I]`` or ``[*, E, T, I]``."""
        return self.backend.expert_linear(x, self.weight, self.bias)

    def keep(self, experts: Sequence[int]) -> None:
        """Drop all experts but these."""
        self.weight = _rows_of(self.weight, experts, dim=-3)
        self.bias = _rows_of(self.bias, experts, dim=-2)
        self.num_experts = len(experts)

    def mix(self, x: Tensor, weights_TE: Tensor) -> Tensor:
        """The experts' outputs added up ``[*, T, O]`` with weights ``[*, T, E]`` that sum to 1."""
        if self.num_experts == 1:
            return self(x).squeeze(-3)
        return self.backend.mix_linear(x, self.weight, self.bias, weights_TE)


class ResidualMLPExperts(nn.Module):
    """E residual blocks ``x + W₂ dropout(ReLU(W₁ x))``.

    Parameters
    ----------
    num_experts, features, hidden_features
        E, I, and the width between the two layers.
    dropout
        Probability that a hidden unit is dropped in training.
    num_channels, backend
        As for :class:`LinearExperts`.
    """

    def __init__(
        self,
        num_experts: int,
        features: int,
        hidden_features: int,
        dropout: float = 0.0,
        num_channels: Optional[int] = None,
        backend: Optional[Backend] = None,
    ) -> None:
        super().__init__()
        self.expand = LinearExperts(num_experts, features, hidden_features, num_channels, backend)
        self.contract = LinearExperts(num_experts, hidden_features, features, num_channels, backend)
        self.dropout = dropout

    def keep(self, experts: Sequence[int]) -> None:
        """Drop all experts but these."""
        self.expand.keep(experts)
        self.contract.keep(experts)

    def forward(self, x: Tensor) -> Tensor:
        """``[*, E, T, I]`` for ``[*, T, I]`` or ``[*, E, T, I]``."""
        hidden = F.dropout(F.relu(self.expand(x)), self.dropout, self.training)
        change_ETI = self.contract(hidden)
        return change_ETI + (x if x.dim() == change_ETI.dim() else x.unsqueeze(-3))


class GatedExperts(nn.Module):
    """E gated feed-forwards without bias, of which each token is sent through its chosen ones.

    Parameters
    ----------
    num_experts, features, hidden_features
        E, I, and the width H of the gated layer.
    dropout
        Probability that a number of the output is dropped in training.
    backend
        As for :class:`LinearExperts`.
    """

    def __init__(
        self,
        num_experts: int,
        features: int,
        hidden_features: int,
        dropout: float = 0.0,
        backend: Optional[Backend] = None,
    ) -> None:
        super().__init__()
        # In memory the inputs of an output lie side by side, as in nn.Linear: the other way round,
        # with powers of two as widths, products of few rows take up to 1.6 times as long.
        expand = torch.empty(num_experts, 2 * hidden_features, features)
        contract = torch.empty(num_experts, features, hidden_features)
        self.expand, self.contract = (nn.Parameter(w.transpose(1, 2)) for w in (expand, contract))
        self.dropout = dropout
        self.backend: Backend = backend or TorchBackend()
        for weight in (self.expand, self.contract):
            bound = 1.0 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)

    def keep(self, experts: Sequence[int]) -> None:
        """Drop all experts but these."""
        self.expand = _rows_of(self.expand, experts, dim=0)
        self.contract = _rows_of(self.contract, experts, dim=0)

    def forward(self, x_TI: Tensor, routing: Optional[Routing] = None) -> Tensor:
        """``[…, I]`` for tokens ``[…, I]`` and what their router decided.

        A single expert needs no router.
        """
        if routing is None:
            gate, up = (x_TI @ self.expand[0]).chunk(2, dim=-1)
            output = (F.silu(gate) * up) @ self.contract[0]
            return F.dropout(output, self.dropout, self.training)
        mixed = self.backend.gated_ffn(
            x_TI.flatten(0, -2),
            routing.weights_TK.flatten(0, -2),
            routing.ids_TK.flatten(0, -2),
            self.expand,
            self.contract,
        )
        return F.dropout(mixed.view_as(x_TI), self.dropout, self.training)


def _rows_of(weight: nn.Parameter, experts: Sequence[int], dim: int) -> nn.Parameter:
    """Of stacked weights those of some experts, in memory as they were."""
    transposed = not weight.is_contiguous()
    kept = weight.detach().mT if transposed else weight.detach()
    kept = kept.index_select(dim, torch.as_tensor(experts, device=weight.device))
    return nn.Parameter(kept.mT if transposed else kept, weight.requires_grad)
