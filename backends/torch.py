"""Routing and expert matrices in plain torch, for CPU and CUDA."""

from functools import cache
from types import ModuleType
from typing import Any, Iterator, NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
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
        if not (x_TI.is_cuda or torch.jit.is_tracing()):
            return _gated_ffn_by_expert(x_TI, weights_TK, ids_TK, expand_EIF, contract_EFO)
        num_experts, top_k = len(expand_EIF), ids_TK.shape[-1]
        # Tokens grouped by expert, so that each expert is one product over all that chose it.
        ids = ids_TK.flatten()
        order = ids.argsort(stable=True)
        grouped = x_TI.index_select(0, order // top_k)
        counts = torch.bincount(ids, minlength=num_experts)
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device)
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


def _gated_ffn_by_expert(
    x_TI: Tensor, weights_TK: Tensor, ids_TK: Tensor, expand_EIF: Tensor, contract_EFO: Tensor
) -> Tensor:
    """As ``Backend.gated_ffn``, for processors: some experts after the others.

    What lies between their two products then stays in the cache.
    """
    inputs = x_TI, weights_TK, ids_TK, expand_EIF, contract_EFO
    device = x_TI.device.type
    # To enter autocast takes as long as a product of one row.
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return _gated_ffn_by_expert(*(t if t is ids_TK else t.to(dtype) for t in inputs))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _GatedFFN.apply(*inputs)
    if ids_TK.numel() <= _FEW_CHOICES:
        return _gated_ffn_by_choice(*inputs)
    choices = _Choices(ids_TK, len(expand_EIF))
    expand, contract = expand_EIF.unbind(), contract_EFO.unbind()
    outputs_RO = x_TI.new_empty(ids_TK.numel(), contract_EFO.shape[-1])
    for block in choices.blocks:
        gate, up = block.linear(x_TI.index_select(0, block.tokens_R), expand).chunk(2, dim=-1)
        hidden = F.silu(gate, inplace=True).mul_(up)
        block.linear(hidden, contract, out=outputs_RO[block.rows])
    return choices.mix(outputs_RO, weights_TK)


# Up to as many choices of experts, to sort them is not worth it.
_FEW_CHOICES = 4
# Rows up to which experts are computed together: they share what is done number by number, and
# it stays in the cache.
_BLOCK_ROWS = 256
# Of few rows and of many, products are fastest with the rows on the left; of those between, with
# the matrix on the left and the rows as columns that lie side by side (MKL).
_AS_COLUMNS = range(4, 160)


class _Block(NamedTuple):
    """Experts that are computed together, for R choices in their order."""

    experts: list[int]
    counts: list[int]
    rows: slice
    tokens_R: Tensor

    def linear(
        self, x_RI: Tensor, weights_IO: Sequence[Tensor], out: Optional[Tensor] = None
    ) -> Tensor:
        """Each expert's rows times its matrix: ``[R, O]``."""
        if out is None:
            out = x_RI.new_empty(len(x_RI), weights_IO[0].shape[-1])
        groups = zip(self.experts, x_RI.split(self.counts), out.split(self.counts))
        for expert, x, y in groups:
            if len(x) in _AS_COLUMNS:
                y.copy_((weights_IO[expert].T @ x.T.contiguous()).T)
            else:
                torch.mm(x, weights_IO[expert], out=y)
        return out

    def grad_linear(self, x_RI: Tensor, grad_RO: Tensor, out: Tensor) -> None:
        """Write the gradients of the matrices of :meth:`linear` into ``out``, ``[E, I, O]``."""
        groups = zip(self.experts, x_RI.split(self.counts), grad_RO.split(self.counts))
        for expert, x, grad in groups:
            torch.mm(x.T, grad, out=out[expert])


class _Choices:
    """The ``R = T * K`` choices of experts, in order of the experts."""

    def __init__(self, ids_TK: Tensor, num_experts: int) -> None:
        ids = ids_TK.flatten()
        self.order_R = ids.argsort()
        self.positions_TK = self.order_R.argsort().view(ids_TK.shape)
        self.counts = torch.bincount(ids, minlength=num_experts).tolist()
        self.blocks: list[_Block] = []
        tokens, begin = self.order_R // ids_TK.shape[-1], 0
        for experts in self._together():
            counts = [self.counts[expert] for expert in experts]
            rows = slice(begin, begin + sum(counts))
            self.blocks.append(_Block(experts, counts, rows, tokens[rows]))
            begin = rows.stop

    def _together(self) -> Iterator[list[int]]:
        """Of the experts that were chosen, those that are computed together."""
        together, rows = [], 0
        for expert, count in enumerate(self.counts):
            if count and together and rows + count > _BLOCK_ROWS:
                yield together
                together, rows = [], 0
            if count:
                together.append(expert)
                rows += count
        yield together

    def mix(self, rows_RO: Tensor, weights_TK: Optional[Tensor] = None) -> Tensor:
        """The sum of each token's rows, weighted: ``[T, O]``."""
        return F.embedding_bag(
            self.positions_TK, rows_RO, mode="sum", per_sample_weights=weights_TK
        )


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
        ctx.choices = choices = _Choices(ids_TK, len(expand_EIF))
        expand, contract = expand_EIF.unbind(), contract_EFO.unbind()
        outputs_RO = x_TI.new_empty(ids_TK.numel(), contract_EFO.shape[-1])
        expanded_by_block = []
        for block in choices.blocks:
            expanded = block.linear(x_TI.index_select(0, block.tokens_R), expand)
            expanded_by_block.append(expanded)
            gate, up = expanded.chunk(2, dim=-1)
            block.linear(F.silu(gate).mul_(up), contract, out=outputs_RO[block.rows])
        ctx.save_for_backward(x_TI, weights_TK, expand_EIF, contract_EFO, *expanded_by_block)
        return choices.mix(outputs_RO, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Optional[Tensor], ...]:
        x_TI, weights_TK, expand_EIF, contract_EFO, *expanded_by_block = ctx.saved_tensors
        choices = ctx.choices
        weights = weights_TK.flatten().index_select(0, choices.order_R).unsqueeze(-1)
        # Weights that are frozen, as in fine-tuning, want none.
        needs_x, _, _, needs_expand, needs_contract = ctx.needs_input_grad
        grad_x_RI = x_TI.new_empty(len(weights), x_TI.shape[-1]) if needs_x else None
        grad_expand = torch.empty_like(expand_EIF) if needs_expand else None
        grad_contract = torch.empty_like(contract_EFO) if needs_contract else None
        grad_weights = torch.empty_like(weights)
        for grads in (grad_expand, grad_contract):
            for expert, count in enumerate(choices.counts):
                if grads is not None and not count:
                    grads[expert].zero_()
        expand_FI, contract_OF = expand_EIF.mT.unbind(), contract_EFO.mT.unbind()
        for block, expanded in zip(choices.blocks, expanded_by_block):
            grad, weight = grad_TO.index_select(0, block.tokens_R), weights[block.rows]
            gate, up = expanded.chunk(2, dim=-1)
            sigmoid = gate.sigmoid()
            activated = gate * sigmoid
            hidden = activated * up
            grad_hidden = block.linear(grad, contract_OF)
            # Before it is weighted, its product with the hidden is the gradient of the weight.
            grad_weights[block.rows] = (grad_hidden * hidden).sum(dim=-1, keepdim=True)
            grad_hidden *= weight
            if grad_contract is not None:
                block.grad_linear(hidden.mul_(weight), grad, out=grad_contract)
            slope = sigmoid * (1 + gate - activated)
            grad_expanded = torch.cat([grad_hidden * up * slope, grad_hidden * activated], dim=-1)
            if grad_expand is not None:
                x = x_TI.index_select(0, block.tokens_R)
                block.grad_linear(x, grad_expanded, out=grad_expand)
            if grad_x_RI is not None:
                block.linear(grad_expanded, expand_FI, out=grad_x_RI[block.rows])
        grad_x = None if grad_x_RI is None else choices.mix(grad_x_RI)
        grad_weights_TK = grad_weights[choices.positions_TK].squeeze(-1)
        return grad_x, grad_weights_TK, None, grad_expand, grad_contract


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
