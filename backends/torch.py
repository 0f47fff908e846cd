"""Routing and expert matrices in plain torch, for CPU and CUDA."""

from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .problems import LinearMixture, Mixed, Scoring

_HAS_TRITON = find_spec("triton") is not None


def _cuda_kernels(x_TI: Tensor) -> Optional[ModuleType]:
    """Kernels of our own, if there is Triton to compile them, and these tokens are for them."""
    if not (_HAS_TRITON and x_TI.is_cuda) or len(x_TI) == 0 or torch.jit.is_tracing():
        return None
    from . import cuda

    return cuda if x_TI.dtype in cuda.DTYPES else None


class TorchBackend:
    """The implementation that every other backend is tested against; see ``Backend``."""

    name = "torch"
    folds = False

    def route(self, logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        if top_k == logits_TE.shape[-1]:
            ids_TK = torch.arange(top_k, device=logits_TE.device).expand_as(logits_TE)
            return logits_TE.softmax(dim=-1), ids_TK
        chosen_TK, ids_TK = logits_TE.topk(top_k, dim=-1)
        return chosen_TK.softmax(dim=-1), ids_TK

    def expert_linear(self, x: Tensor, weight_EIO: Tensor, bias_EO: Tensor) -> Tensor:
        x_ETI, bias_E1O = self._one_input_each(x, weight_EIO), bias_EO.unsqueeze(-2)
        if weight_EIO.dim() == 3:
            return torch.baddbmm(bias_E1O, x_ETI.expand(len(weight_EIO), -1, -1), weight_EIO)
        return x_ETI @ weight_EIO + bias_E1O

    def mix_linear(
        self, x: Tensor, weight_EIO: Tensor, bias_EO: Tensor, weights_TE: Tensor
    ) -> Tensor:
        # Weighting the inputs instead of the outputs leaves one product over all experts:
        # [T, E*I] @ [E*I, O], with no [E, T, O] in memory.
        x_ETI = self._one_input_each(x, weight_EIO)
        weighted_TEI = x_ETI.transpose(-3, -2) * weights_TE.unsqueeze(-1)
        weight_EI_O = weight_EIO.flatten(-3, -2)
        return weighted_TEI.flatten(-2) @ weight_EI_O + weights_TE @ bias_EO

    def gated_ffn(
        self,
        x_TI: Tensor,
        weights_TK: Tensor,
        ids_TK: Tensor,
        expand_EIF: Tensor,
        contract_EFO: Tensor,
    ) -> Tensor:
        if len(x_TI) == 0:
            return x_TI.new_zeros(0, contract_EFO.shape[-1])
        if torch.jit.is_tracing():
            return _gated_ffn_in_trace(x_TI, weights_TK, ids_TK, expand_EIF, contract_EFO)
        kernels = _cuda_kernels(x_TI)
        if kernels is not None:
            return kernels.gated_ffn(x_TI, weights_TK, ids_TK, expand_EIF, contract_EFO)
        return _gated_ffn_by_expert(x_TI, weights_TK, ids_TK, expand_EIF, contract_EFO)

    def routed_ffn(
        self,
        x_TI: Tensor,
        scoring: Scoring,
        top_k: int,
        expand_EIF: Tensor,
        contract_EFO: Tensor,
    ) -> Mixed:
        weights_TK, ids_TK, scores_TE = self._choose(x_TI, scoring, top_k)
        y_TO = self.gated_ffn(x_TI, weights_TK, ids_TK, expand_EIF, contract_EFO)
        return Mixed(y_TO, weights_TK, ids_TK, scores_TE)

    def linear_mixture(self, x_GTF: Tensor, mixture: LinearMixture, top_k: int) -> Mixed:
        x_G1TF = x_GTF.unsqueeze(1)
        y_GETO = x_G1TF @ mixture.direct_GEFO
        if mixture.hidden_GEFH is not None and mixture.contract_GEHO is not None:
            y_GETO = y_GETO + F.relu(x_G1TF @ mixture.hidden_GEFH) @ mixture.contract_GEHO
        if mixture.router_hidden_GFR is None or mixture.router_output_GRE is None:
            ones = x_GTF.new_ones(*x_GTF.shape[:2], 1)
            return Mixed(y_GETO.squeeze(1), ones, torch.zeros_like(ones, dtype=torch.long), ones)
        logits_GTE = F.relu(x_GTF @ mixture.router_hidden_GFR) @ mixture.router_output_GRE
        scores_GTE = logits_GTE.softmax(dim=-1)
        weights_GTK, ids_GTK = self.route(logits_GTE, top_k)
        weights_GTE = torch.zeros_like(scores_GTE).scatter(-1, ids_GTK, weights_GTK)
        y_GTO = torch.einsum("geto,gte->gto", y_GETO, weights_GTE)
        return Mixed(y_GTO, weights_GTK, ids_GTK, scores_GTE)

    def _choose(self, x_TI: Tensor, scoring: Scoring, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and numbers of the chosen experts, and the scores of all."""
        kernels = _cuda_kernels(x_TI)
        if kernels is not None and top_k < len(scoring.weight_EI) and not torch.is_grad_enabled():
            return kernels.route(x_TI, scoring, top_k)
        logits_TE = scoring.logits(x_TI)
        scores_TE = logits_TE.softmax(dim=-1)
        weights_TK, ids_TK = self.route(logits_TE, top_k)
        if scoring.weighted_by_score:
            weights_TK = scores_TE.gather(-1, ids_TK)
        return weights_TK, ids_TK, scores_TE

    @staticmethod
    def _one_input_each(x: Tensor, weight_EIO: Tensor) -> Tensor:
        return x if x.dim() == weight_EIO.dim() else x.unsqueeze(-3)


def _gated_ffn_by_expert(
    x_TI: Tensor, weights_TK: Tensor, ids_TK: Tensor, expand_EIF: Tensor, contract_EFO: Tensor
) -> Tensor:
    """As ``Backend.gated_ffn``, for processors: one expert after the other.

    What lies between an expert's two products then stays in the cache.
    """
    device = x_TI.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_TI, weights_TK = x_TI.to(dtype), weights_TK.to(dtype)
        expand_EIF, contract_EFO = expand_EIF.to(dtype), contract_EFO.to(dtype)
    inputs = x_TI, weights_TK, ids_TK, expand_EIF, contract_EFO
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            return _GatedFFN.apply(*inputs)
        if ids_TK.numel() <= _FEW_ROWS:
            return _gated_ffn_by_choice(*inputs)
        return _forward_by_expert(*inputs)[0]


def _gated_ffn_in_trace(
    x_TI: Tensor, weights_TK: Tensor, ids_TK: Tensor, expand_EIF: Tensor, contract_EFO: Tensor
) -> Tensor:
    """As ``Backend.gated_ffn``, so that nothing depends on how many rows each expert has."""
    gate, up = torch.einsum("ti,tkif->tkf", x_TI, expand_EIF[ids_TK]).chunk(2, dim=-1)
    hidden = weights_TK.unsqueeze(-1) * F.silu(gate) * up
    return torch.einsum("tkf,tkfo->to", hidden, contract_EFO[ids_TK])


class _Group(NamedTuple):
    """The tokens of one expert, R of them."""

    expert: int
    tokens_R: Tensor
    # Where they lie among all groups, which are in order of the experts.
    rows: slice


def _groups(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, list[_Group]]:
    """Which of the ``T * K`` choices are whose, and the experts that have any."""
    top_k = ids_TK.shape[-1]
    ids = ids_TK.flatten()
    order = ids.argsort(stable=True)
    tokens, begin, groups = order // top_k, 0, []
    for expert, count in enumerate(torch.bincount(ids, minlength=num_experts).tolist()):
        if count:
            rows = slice(begin, begin + count)
            groups.append(_Group(expert, tokens[rows], rows))
            begin += count
    return order, groups


# A product of few rows is faster with the rows on the left, one of many with the matrix (MKL).
_FEW_ROWS = 4


def _product(weight_IO: Tensor, x_RI: Tensor) -> Tensor:
    """``[O, R]``: the rows times the matrix, transposed."""
    if len(x_RI) < _FEW_ROWS:
        return (x_RI @ weight_IO).T
    return weight_IO.T @ x_RI.T


def _gated_ffn_by_choice(
    x_TI: Tensor, weights_TK: Tensor, ids_TK: Tensor, expand_EIF: Tensor, contract_EFO: Tensor
) -> Tensor:
    """As ``Backend.gated_ffn``, for so few tokens that sorting them is not worth it."""
    y_TO = x_TI.new_zeros(len(x_TI), contract_EFO.shape[-1])
    for x_I, y_O, weights, ids in zip(x_TI, y_TO, weights_TK.tolist(), ids_TK.tolist()):
        for weight, expert in zip(weights, ids):
            gate, up = torch.mv(expand_EIF[expert].T, x_I).chunk(2)
            y_O.addmv_(contract_EFO[expert].T, F.silu(gate, inplace=True).mul_(up), alpha=weight)
    return y_TO


def _forward_by_expert(
    x_TI: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    expand_EIF: Tensor,
    contract_EFO: Tensor,
    expanded_FR: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, list[_Group]]:
    """The mixture; and, for the backward pass, the choices in order and their groups.

    What the first products give is left in ``expanded_FR``, if there is one.
    """
    order, groups = _groups(ids_TK, len(expand_EIF))
    weights = weights_TK.flatten().index_select(0, order)
    y_TO = x_TI.new_zeros(len(x_TI), contract_EFO.shape[-1])
    for expert, tokens, rows in groups:
        expanded = _product(expand_EIF[expert], x_TI.index_select(0, tokens))
        if expanded_FR is not None:
            expanded_FR[:, rows] = expanded
        gate, up = expanded.chunk(2)
        output = _product(contract_EFO[expert], (F.silu(gate, inplace=True).mul_(up)).T).T
        y_TO.index_add_(0, tokens, output * weights[rows, None])
    return y_TO, order, groups


class _GatedFFN(torch.autograd.Function):
    """The same with its gradients written out, so that those of unchosen experts cost nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weights_TK: Tensor,
        ids_TK: Tensor,
        expand_EIF: Tensor,
        contract_EFO: Tensor,
    ) -> Tensor:
        expanded_FR = x_TI.new_empty(expand_EIF.shape[-1], ids_TK.numel())
        y_TO, order, ctx.groups = _forward_by_expert(
            x_TI, weights_TK, ids_TK, expand_EIF, contract_EFO, expanded_FR
        )
        ctx.save_for_backward(x_TI, weights_TK, expand_EIF, contract_EFO, expanded_FR, order)
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Optional[Tensor], ...]:
        x_TI, weights_TK, expand_EIF, contract_EFO, expanded_FR, order = ctx.saved_tensors
        weights = weights_TK.flatten().index_select(0, order)
        # Weights that are frozen, as in fine-tuning, want none.
        needs_x, _, _, needs_expand, needs_contract = ctx.needs_input_grad
        grad_x = torch.zeros_like(x_TI) if needs_x else None
        grad_expand = torch.empty_like(expand_EIF) if needs_expand else None
        grad_contract = torch.empty_like(contract_EFO) if needs_contract else None
        grad_weights = torch.empty_like(weights)
        for expert in set(range(len(expand_EIF))) - {group.expert for group in ctx.groups}:
            for grad_weight in (grad_expand, grad_contract):
                if grad_weight is not None:
                    grad_weight[expert].zero_()
        for expert, tokens, rows in ctx.groups:
            grad, weight = grad_TO.index_select(0, tokens), weights[rows]
            gate, up = expanded_FR[:, rows].chunk(2)
            sigmoid = gate.sigmoid()
            activated = gate * sigmoid
            hidden = activated * up
            grad_hidden = (grad @ contract_EFO[expert].T).T.contiguous()
            # Before it is weighted, its product with the hidden is the gradient of the weight.
            grad_weights[rows] = (grad_hidden * hidden).sum(dim=0)
            grad_hidden *= weight
            if grad_contract is not None:
                torch.mm(hidden.mul_(weight), grad, out=grad_contract[expert])
            slope = sigmoid * (1 + gate - activated)
            grad_expanded = torch.cat([grad_hidden * up * slope, grad_hidden * activated])
            if grad_expand is not None:
                x = x_TI.index_select(0, tokens)
                torch.mm(x.T, grad_expanded.T, out=grad_expand[expert])
            if grad_x is not None:
                grad_x.index_add_(0, tokens, grad_expanded.T @ expand_EIF[expert].T)
        grad_weights_TK = torch.empty_like(weights).index_copy_(0, order, grad_weights)
        return grad_x, grad_weights_TK.view_as(weights_TK), None, grad_expand, grad_contract
