"""Routing and expert matrices in plain torch, for CPU and CUDA."""

from functools import cache
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from .problems import LinearMixture, Mixed, Scoring

# Rows of zeros, in multiples of the rows there are, that one batched product is worth on CUDA.
_MOST_PADDING = 4


@cache
def _cuda_kernels() -> Optional[ModuleType]:
    """Kernels of our own, where Triton is there to compile them."""
    try:
        from . import cuda
    except ImportError:
        return None
    return cuda


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
        kernels = _cuda_kernels() if x_TI.is_cuda else None
        if kernels is not None and x_TI.dtype == torch.float32 and not torch.is_grad_enabled():
            return kernels.gated_ffn(x_TI, weights_TK, ids_TK, expand_EIF, contract_EFO)
        num_experts, top_k = len(expand_EIF), ids_TK.shape[-1]
        # Tokens grouped by expert, so that each expert is one product over all that chose it.
        ids = ids_TK.flatten()
        order = ids.argsort(stable=True)
        grouped = x_TI.index_select(0, order // top_k)
        counts = torch.bincount(ids, minlength=num_experts)
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device)
        if not (x_TI.is_cuda or torch.is_grad_enabled() or torch.jit.is_tracing()):
            outputs = _grouped_ffn(grouped, expand_EIF, contract_EFO, counts.tolist())
            mixture = weights_TK.to(outputs.dtype)
            places = position.view_as(ids_TK)
            # The rows gathered, weighted and added up in one pass.
            return F.embedding_bag(places, outputs, per_sample_weights=mixture, mode="sum")
        gate, up = grouped_linear(grouped, expand_EIF, counts).chunk(2, dim=-1)
        outputs = grouped_linear(F.silu(gate) * up, contract_EFO, counts)
        outputs_TKO = outputs[position].unflatten(0, (-1, top_k))
        return torch.bmm(weights_TK.unsqueeze(1), outputs_TKO).squeeze(1)

    def routed_ffn(
        self,
        x_TI: Tensor,
        scoring: Scoring,
        top_k: int,
        expand_EIF: Tensor,
        contract_EFO: Tensor,
    ) -> Mixed:
        logits_TE = scoring.logits(x_TI)
        scores_TE = logits_TE.softmax(dim=-1)
        weights_TK, ids_TK = self.route(logits_TE, top_k)
        if scoring.weighted_by_score:
            weights_TK = scores_TE.gather(-1, ids_TK)
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

    @staticmethod
    def _one_input_each(x: Tensor, weight_EIO: Tensor) -> Tensor:
        return x if x.dim() == weight_EIO.dim() else x.unsqueeze(-3)


def _grouped_ffn(x: Tensor, expand_EIF: Tensor, contract_EFO: Tensor, counts: list[int]) -> Tensor:
    """Consecutive groups of rows, each through the gated feed-forward of its own expert.

    One expert after the other, so that what is between its two products stays in the processor's
    cache, and in memory that the next expert uses again.
    """
    outputs = x.new_empty(len(x), contract_EFO.shape[-1])
    experts = zip(x.split(counts), outputs.split(counts), expand_EIF, contract_EFO)
    for group, output, expand, contract in experts:
        if len(group):
            gate, up = (group @ expand).chunk(2, dim=-1)
            output.copy_(F.silu(gate).mul_(up) @ contract)
    return outputs


def grouped_linear(x: Tensor, weight_EIO: Tensor, counts_E: Tensor) -> Tensor:
    """Consecutive groups of rows, each times a matrix of its own.

    Parameters
    ----------
    x
        ``[rows, I]``, the first ``counts_E[0]`` of which belong to the first expert, and so on.

    Returns
    -------
    Tensor
        ``[rows, O]``.
    """
    if torch.jit.is_tracing():
        # A trace may not depend on how many rows each expert has.
        ids = torch.repeat_interleave(counts_E, output_size=len(x))
        return (x.unsqueeze(-2) @ weight_EIO[ids]).squeeze(-2)
    counts = counts_E.tolist()
    if x.is_cuda and max(counts) * len(counts) <= _MOST_PADDING * len(x):
        return _padded_linear(x, weight_EIO, counts_E, max(counts))
    # Unbinding keeps the gradient of the weights one stacked tensor.
    parts = [
        group @ weight
        for group, weight in zip(x.split(counts), weight_EIO.unbind())
        if len(group) or torch.is_grad_enabled()
    ]
    return torch.cat(parts)


def _padded_linear(x: Tensor, weight_EIO: Tensor, counts_E: Tensor, largest: int) -> Tensor:
    """As :func:`grouped_linear`, by one batched product over groups padded to the largest."""
    ids = torch.repeat_interleave(counts_E, output_size=len(x))
    first_E = counts_E.cumsum(0) - counts_E
    position = torch.arange(len(x), device=x.device) - first_E[ids]
    padded = x.new_zeros(len(weight_EIO), largest, x.shape[-1])
    padded[ids, position] = x
    return torch.bmm(padded, weight_EIO)[ids, position]
