"""Routing and expert matrices in plain torch, for CPU and CUDA."""

import mmap
from contextlib import suppress
from importlib.util import find_spec
from itertools import accumulate
from types import ModuleType
from typing import Any, Iterator, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import cpu
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
        device = x_TI.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            tensors = (x_TI, weights_TK, expand_EIF, contract_EFO)
            x, weights, expand, contract = (tensor.to(dtype) for tensor in tensors)
            # Not entered otherwise: that takes as long as a product of one row.
            with torch.autocast(device, enabled=False):
                return self.gated_ffn(x, weights, ids_TK, expand, contract)
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


# Choices of experts up to which it is not worth it to sort them.
_FEW_CHOICES = 4
# Rows for which a product is faster with the matrix on the left and the rows as columns, copied to
# lie side by side (MKL; benchmarks/expert_products.py).
_AS_COLUMNS = range(4, 160)
# The largest block of memory, bytes, that glibc keeps when it is freed.
_LARGEST_KEPT = 32 * 2**20


def _gated_ffn_by_expert(
    x_TI: Tensor, weights_TK: Tensor, ids_TK: Tensor, expand_EIF: Tensor, contract_EFO: Tensor
) -> Tensor:
    """As ``Backend.gated_ffn``, for processors: one expert after the other.

    What lies between an expert's two products then stays in the cache.
    """
    inputs = x_TI, weights_TK, ids_TK, expand_EIF, contract_EFO
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _GatedFFN.apply(*inputs)
    if ids_TK.numel() <= _FEW_CHOICES:
        return _gated_ffn_by_choice(*inputs)
    choices = _Choices(ids_TK, len(expand_EIF))
    return choices.mix(_outputs(choices, x_TI, expand_EIF, contract_EFO), weights_TK)


def _gated_ffn_in_trace(
    x_TI: Tensor, weights_TK: Tensor, ids_TK: Tensor, expand_EIF: Tensor, contract_EFO: Tensor
) -> Tensor:
    """As ``Backend.gated_ffn``, so that nothing depends on how many rows each expert has."""
    gate, up = torch.einsum("ti,tkif->tkf", x_TI, expand_EIF[ids_TK]).chunk(2, dim=-1)
    hidden = weights_TK.unsqueeze(-1) * F.silu(gate) * up
    return torch.einsum("tkf,tkfo->to", hidden, contract_EFO[ids_TK])


def _gated_ffn_by_choice(
    x_TI: Tensor, weights_TK: Tensor, ids_TK: Tensor, expand_EIF: Tensor, contract_EFO: Tensor
) -> Tensor:
    """As ``Backend.gated_ffn``, for so few tokens that sorting them is not worth it."""
    experts, top_k = ids_TK.flatten().tolist(), ids_TK.shape[1]
    outputs_RO = x_TI.new_empty(len(experts), contract_EFO.shape[-1])
    if cpu.takes(x_TI, len(ids_TK), experts, expand_EIF, contract_EFO):
        segments = [(expert, row, 1) for row, expert in enumerate(experts)]
        tokens = [row // top_k for row in range(len(experts))]
        cpu.gated_ffn(x_TI, tokens, segments, expand_EIF, contract_EFO, outputs_RO)
    else:
        for row, expert in enumerate(experts):
            gate, up = torch.mv(expand_EIF[expert].T, x_TI[row // top_k]).chunk(2)
            hidden = F.silu(gate, inplace=True).mul_(up)
            torch.mv(contract_EFO[expert].T, hidden, out=outputs_RO[row])
    if len(x_TI) == 1:
        return weights_TK @ outputs_RO
    return torch.bmm(weights_TK.unsqueeze(1), outputs_RO.view(*ids_TK.shape, -1)).squeeze(1)


class _Choices:
    """The ``R = T * K`` choices of experts, in order of the experts.

    Attributes
    ----------
    num_tokens
        T.
    order_R, tokens_R
        Which choice of which token comes where.
    experts
        Those that were chosen.
    least, most
        How often one of these was chosen at least and at most.
    """

    def __init__(self, ids_TK: Tensor, num_experts: int) -> None:
        ids = ids_TK.flatten()
        self.num_tokens = len(ids_TK)
        self.order_R = ids.argsort()
        self.tokens_R = self.order_R // ids_TK.shape[-1]
        self._place_TK = self.order_R.argsort().view_as(ids_TK)
        counts = torch.bincount(ids, minlength=num_experts).tolist()
        self.experts = [expert for expert, count in enumerate(counts) if count]
        self._counts = [counts[expert] for expert in self.experts]
        self.least, self.most = min(self._counts), max(self._counts)

    def by_expert(self, *rows_R: Tensor) -> Iterator[tuple[Any, ...]]:
        """Each expert that was chosen, and its part of each of these."""
        return zip(self.experts, *(rows.split(self._counts) for rows in rows_R))

    def segments(self, most: int) -> list[tuple[int, int, int]]:
        """Expert, first row and number of rows, of each that has at most so many."""
        starts = accumulate(self._counts, initial=0)
        parts = zip(self.experts, starts, self._counts)
        return [(expert, start, count) for expert, start, count in parts if count <= most]

    def mix(self, rows_RO: Tensor, weights_TK: Optional[Tensor] = None) -> Tensor:
        """The sum of each token's rows, weighted: ``[T, O]``."""
        # Adding each expert's rows to their tokens takes ten times as long.
        return F.embedding_bag(self._place_TK, rows_RO, mode="sum", per_sample_weights=weights_TK)

    def by_token(self, values_R: Tensor) -> Tensor:
        """``[T, K]``."""
        return values_R[self._place_TK]


def _outputs(
    choices: _Choices,
    x_TI: Tensor,
    expand_EIF: Tensor,
    contract_EFO: Tensor,
    kept: Optional[dict[int, Tensor]] = None,
) -> Tensor:
    """The experts' outputs ``[R, O]``; what the first products give is kept, if there is where."""

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate, inplace=kept is None).mul_(up)

    def keep(expert: int, expanded_RF: Tensor) -> None:
        if kept is not None:
            kept[expert] = expanded_RF

    def expanded_for(rows: int) -> Tensor:
        return x_TI.new_empty(rows, expand_EIF.shape[-1])

    rows = len(choices.order_R)
    outputs_RO = x_TI.new_empty(rows, contract_EFO.shape[-1])
    # Rows up to which an expert is the kernels'.
    stacks = expand_EIF, contract_EFO
    takes = cpu.takes(x_TI, choices.num_tokens, choices.experts, *stacks)
    few = cpu.MOST_ROWS if takes else 0
    if choices.least <= few:
        segments = choices.segments(few)
        counts = [number for _, _, number in segments]
        expanded_SF = None if kept is None else expanded_for(sum(counts))
        cpu.gated_ffn(x_TI, choices.tokens_R, segments, *stacks, outputs_RO, expanded_SF)
        if expanded_SF is not None:
            for (expert, _, _), expanded in zip(segments, expanded_SF.split(counts)):
                keep(expert, expanded)
    if choices.most <= few:
        return outputs_RO
    expand_FI, contract_OF = expand_EIF.mT.unbind(), contract_EFO.mT.unbind()
    x_RI = x_TI.index_select(0, choices.tokens_R)
    if choices.most < _AS_COLUMNS.start:
        # What lies between the products is then one step for all experts.
        expanded_RF = expanded_for(rows)
        for expert, x, expanded in choices.by_expert(x_RI, expanded_RF):
            keep(expert, torch.mm(x, expand_FI[expert].T, out=expanded))
        hidden_RH = gated(*expanded_RF.chunk(2, dim=1))
        for expert, hidden, output in choices.by_expert(hidden_RH, outputs_RO):
            torch.mm(hidden, contract_OF[expert].T, out=output)
        return outputs_RO
    for expert, x, output in choices.by_expert(x_RI, outputs_RO):
        if len(x) <= few:
            continue
        if len(x) in _AS_COLUMNS:
            expanded_FR = torch.mm(expand_FI[expert], x.T.contiguous())
            keep(expert, expanded_FR.T)
            hidden_HR = gated(*expanded_FR.chunk(2))
            output.copy_(torch.mm(contract_OF[expert], hidden_HR).T)
        else:
            expanded = torch.mm(x, expand_FI[expert].T)
            keep(expert, expanded)
            torch.mm(gated(*expanded.chunk(2, dim=1)), contract_OF[expert].T, out=output)
    return outputs_RO


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
        kept: dict[int, Tensor] = {}
        ctx.choices = choices = _Choices(ids_TK, len(expand_EIF))
        outputs_RO = _outputs(choices, x_TI, expand_EIF, contract_EFO, kept)
        expanded = (kept[expert] for expert in choices.experts)
        ctx.save_for_backward(x_TI, weights_TK, expand_EIF, contract_EFO, *expanded)
        return choices.mix(outputs_RO, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Optional[Tensor], ...]:
        x_TI, weights_TK, expand_EIF, contract_EFO, *kept = ctx.saved_tensors
        choices: _Choices = ctx.choices
        x_RI, grad_RO = (rows.index_select(0, choices.tokens_R) for rows in (x_TI, grad_TO))
        weights_R1 = weights_TK.flatten().index_select(0, choices.order_R).unsqueeze(-1)
        # Weights that are frozen, as in fine-tuning, want none.
        needs_x, _, _, needs_expand, needs_contract = ctx.needs_input_grad
        grad_x_RI, grad_weights_R1 = torch.empty_like(x_RI), torch.empty_like(weights_R1)
        grad_expand = _gradient_like(expand_EIF) if needs_expand else None
        grad_contract = _gradient_like(contract_EFO) if needs_contract else None
        for expert in set(range(len(expand_EIF))).difference(choices.experts):
            for grad_weight in (grad_expand, grad_contract):
                if grad_weight is not None:
                    grad_weight[expert].zero_()
        parts = choices.by_expert(x_RI, grad_RO, weights_R1, grad_x_RI, grad_weights_R1)
        for (expert, x, grad, weight, grad_x, grad_weight), expanded in zip(parts, kept):
            gate, up = expanded.contiguous().chunk(2, dim=-1)
            activated = F.silu(gate)
            hidden = activated * up
            grad_hidden = torch.mm(grad, contract_EFO[expert].T)
            # Before it is weighted, its product with the hidden is the gradient of the weight.
            torch.sum(grad_hidden * hidden, dim=-1, keepdim=True, out=grad_weight)
            grad_hidden *= weight
            if grad_contract is not None:
                torch.mm(hidden.mul_(weight).T, grad, out=grad_contract[expert])
            grad_expanded = expanded.new_empty(expanded.shape)
            grad_gate, grad_up = grad_expanded.chunk(2, dim=-1)
            torch.mul(grad_hidden, activated, out=grad_up)
            grad_activated = grad_hidden.mul_(up)
            torch.ops.aten.silu_backward.grad_input(grad_activated, gate, grad_input=grad_gate)
            if grad_expand is not None:
                torch.mm(x.T, grad_expanded, out=grad_expand[expert])
            if needs_x:
                torch.mm(grad_expanded, expand_EIF[expert].T, out=grad_x)
        grad_x_TI = choices.mix(grad_x_RI) if needs_x else None
        grad_weights_TK = choices.by_token(grad_weights_R1.squeeze(-1))
        return grad_x_TI, grad_weights_TK, None, grad_expand, grad_contract


def _gradient_like(weight: Tensor) -> Tensor:
    """As ``torch.empty_like``, a large one in huge pages.

    It is new in each step, and Linux clears its memory page by page when it is first written.
    """
    size = weight.numel() * weight.element_size()
    if not weight.is_cpu or size <= _LARGEST_KEPT or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty_like(weight)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # A kernel without them.
        pages.madvise(mmap.MADV_HUGEPAGE)
    strides = torch.empty_like(weight, device="meta").stride()
    return torch.frombuffer(pages, dtype=weight.dtype).as_strided(weight.shape, strides)
