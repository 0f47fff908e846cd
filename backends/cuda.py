"""Routers and gated experts on CUDA, in Triton kernels, without waiting for the device.

Choices are sorted by expert once; the rows of each expert are then worked through in tiles of one
expert each, gathered where they lie. How many tiles there are is only bounded on the host, so that
nothing is waited for; those too many end at once.

Float32 products are of three TF32 parts each, as exact as those of float32 (Ootomo & Yokota 2022);
of one where torch is allowed TF32. Sums are float32 in every precision.
"""

from typing import Any, NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .problems import Scoring

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tile(NamedTuple):
    """How a product is cut up, and what works on one piece.

    Attributes
    ----------
    rows, columns, depth
        Of the piece that is computed at once, and how much of the sum in one step.
    num_warps, num_stages
        Threads by 32, and steps whose numbers are on their way at once.
    span
        Pieces side by side that one program computes one after the other.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    span: int = 1


class Tiles(NamedTuple):
    """Of the three kinds of product; ``gradient`` is that of weights, its rows are features."""

    expand: Tile
    contract: Tile
    gradient: Tile


def tiles_for(dtype: torch.dtype, rows_per_expert: float, hidden_features: int) -> Tiles:
    """The fastest that ``benchmarks/expert_tiles.py`` found on an H100, or nearly."""
    if dtype == torch.float32:
        if rows_per_expert <= 8:
            return Tiles(Tile(16, 32, 32, 4, 3), Tile(16, 32, 32, 4, 3), Tile(64, 64, 32, 4, 3))
        if rows_per_expert <= 64:
            return Tiles(Tile(64, 32, 32, 4, 3), Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3))
        return Tiles(Tile(128, 32, 32, 4, 3), Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3))
    if rows_per_expert <= 8:
        return Tiles(Tile(16, 32, 64, 4, 3), Tile(16, 64, 128, 4, 3), Tile(64, 64, 32, 4, 3))
    if rows_per_expert <= 64:
        return Tiles(Tile(32, 64, 64, 4, 3), Tile(32, 64, 64, 4, 3), Tile(64, 128, 64, 4, 3))
    if rows_per_expert <= 256:
        return Tiles(Tile(64, 64, 64, 4, 3), Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 4, 3))
    if hidden_features < 1024:
        return Tiles(Tile(128, 128, 64, 8, 3, 2), Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3))
    return Tiles(Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3))


@triton.jit
def _count_kernel(
    ids_ptr, counts_ptr, num_choices, num_blocks,
    num_experts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """How many choices of one block fall on each expert."""
    experts = tl.arange(0, triton.next_power_of_2(num_experts))
    choice = tl.program_id(0) * block + tl.arange(0, block)
    ids = tl.load(ids_ptr + choice, mask=choice < num_choices, other=-1).to(tl.int32)
    counts = tl.sum((ids[:, None] == experts[None, :]).to(tl.int32), axis=0)
    at = counts_ptr + experts * num_blocks + tl.program_id(0)
    tl.store(at, counts, mask=experts < num_experts)


@triton.jit
def _place_kernel(
    ids_ptr, counts_ptr, ends_ptr, order_ptr, num_choices, num_blocks,
    num_experts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Where the choices of one block come to lie, after those of earlier blocks."""
    experts = tl.arange(0, triton.next_power_of_2(num_experts))
    choice = tl.program_id(0) * block + tl.arange(0, block)
    inside = choice < num_choices
    ids = tl.load(ids_ptr + choice, mask=inside, other=0).to(tl.int32)
    mine = (ids[:, None] == experts[None, :]).to(tl.int32) * inside[:, None].to(tl.int32)
    earlier = tl.sum((tl.cumsum(mine, axis=0) - mine) * mine, axis=1)
    at = ids * num_blocks + tl.program_id(0)
    begin = tl.load(ends_ptr + at, mask=inside) - tl.load(counts_ptr + at, mask=inside)
    tl.store(order_ptr + begin + earlier, choice, mask=inside)


@triton.jit
def _expert_of_tile(tile, ends_ptr, num_blocks, num_experts: tl.constexpr, rows: tl.constexpr):
    """The expert that a tile belongs to, its first row, and where the expert's rows end."""
    experts = tl.arange(0, triton.next_power_of_2(num_experts))
    real = experts < num_experts
    ends = tl.load(ends_ptr + (experts + 1) * num_blocks - 1, mask=real, other=0)
    begins = tl.load(ends_ptr + experts * num_blocks - 1, mask=real & (experts > 0), other=0)
    tiles = (tl.maximum(ends - begins, 0) + rows - 1) // rows
    expert = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    inside = tile < tl.sum(tiles, axis=0)
    tile_of_expert = tile - tl.sum(tl.where(experts < expert, tiles, 0), axis=0)
    begin = tl.sum(tl.where(experts == expert, begins, 0), axis=0)
    end = tl.sum(tl.where(experts == expert, ends, 0), axis=0)
    return expert.to(tl.int64), begin + tile_of_expert * rows, end, inside


@triton.jit
def _product(
    a_at, b_at, b_step, size: tl.constexpr, precision: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """``[rows, columns]``: rows of ``size`` numbers side by side, times a matrix."""
    total = tl.zeros((rows, columns), dtype=tl.float32)
    for start in range(0, size, depth):
        if size % depth == 0:
            a = tl.load(a_at + start)
            b = tl.load(b_at + start * b_step)
        else:
            deep = start + tl.arange(0, depth) < size
            a = tl.load(a_at + start, mask=deep[None, :], other=0.0)
            b = tl.load(b_at + start * b_step, mask=deep[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=precision)
    return total


@triton.jit
def _expand_kernel(
    x_ptr, order_ptr, weight_ptr, hidden_ptr, expanded_ptr, ends_ptr, num_blocks,
    top_k: tl.constexpr, features: tl.constexpr, hidden_features: tl.constexpr,
    expert_stride: tl.constexpr, row_stride: tl.constexpr, column_stride: tl.constexpr,
    num_experts: tl.constexpr, kept_for_backward: tl.constexpr, precision: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """``SiLU(x @ gate) * (x @ up)`` of the rows of one tile, gathered from the tokens."""
    # Neighbouring programs share the rows, which are then still in the cache.
    spans: tl.constexpr = (hidden_features + columns * span - 1) // (columns * span)
    expert, row, end, inside = _expert_of_tile(
        tl.program_id(0) // spans, ends_ptr, num_blocks, num_experts, rows
    )
    if not inside:
        return
    r = row + tl.arange(0, rows)
    token = (tl.load(order_ptr + tl.minimum(r, end - 1)) // top_k).to(tl.int64)
    kept = (r < end)[:, None]
    r = r.to(tl.int64)[:, None]
    k = tl.arange(0, depth)
    x_at = x_ptr + token[:, None] * features + k[None, :]
    # The columns of gate and up alternate, so that each pair ends in the same thread.
    pair = tl.arange(0, 2 * columns)
    for number in range(span):
        first = ((tl.program_id(0) % spans) * span + number) * columns
        column = (first + pair // 2) % hidden_features + (pair % 2) * hidden_features
        weight_at = weight_ptr + expert * expert_stride
        weight_at += k[:, None] * row_stride + column[None, :] * column_stride
        total = _product(x_at, weight_at, row_stride, features, precision, rows, 2 * columns, depth)
        gate, up = tl.split(tl.reshape(total, (rows, columns, 2)))
        c = (first + tl.arange(0, columns))[None, :]
        within = kept & (c < hidden_features)
        hidden = gate * tl.sigmoid(gate) * up
        tl.store(hidden_ptr + r * hidden_features + c, hidden, mask=within)
        if kept_for_backward:
            at = expanded_ptr + r * (2 * hidden_features) + c
            tl.store(at, gate, mask=within)
            tl.store(at + hidden_features, up, mask=within)


@triton.jit
def _contract_kernel(
    hidden_ptr, order_ptr, weight_ptr, out_ptr, ends_ptr, num_blocks,
    hidden_features: tl.constexpr, features: tl.constexpr,
    expert_stride: tl.constexpr, row_stride: tl.constexpr, column_stride: tl.constexpr,
    num_experts: tl.constexpr, precision: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """``hidden @ contract`` of the rows of one tile, written where they came from."""
    spans: tl.constexpr = (features + columns * span - 1) // (columns * span)
    expert, row, end, inside = _expert_of_tile(
        tl.program_id(0) // spans, ends_ptr, num_blocks, num_experts, rows
    )
    if not inside:
        return
    r = row + tl.arange(0, rows)
    kept = (r < end)[:, None]
    r = tl.minimum(r, end - 1)
    place = tl.load(order_ptr + r).to(tl.int64)[:, None]
    k = tl.arange(0, depth)
    hidden_at = hidden_ptr + r.to(tl.int64)[:, None] * hidden_features + k[None, :]
    for number in range(span):
        c = ((tl.program_id(0) % spans) * span + number) * columns + tl.arange(0, columns)
        weight_at = weight_ptr + expert * expert_stride
        weight_at += k[:, None] * row_stride + (c % features)[None, :] * column_stride
        total = _product(
            hidden_at, weight_at, row_stride, hidden_features, precision, rows, columns, depth
        )
        within = kept & (c < features)[None, :]
        tl.store(out_ptr + place * features + c[None, :], total, mask=within)


@triton.jit
def _mix_kernel(
    outputs_ptr, mixture_ptr, mixed_ptr, num_tokens,
    top_k: tl.constexpr, features: tl.constexpr, weighted: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """The sum over each token's choices."""
    token = tl.program_id(0) * rows + tl.arange(0, rows)
    c = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = token < num_tokens
    kept = inside[:, None] & (c < features)[None, :]
    token = token.to(tl.int64)
    total = tl.zeros((rows, columns), dtype=tl.float32)
    for choice in tl.static_range(top_k):
        at = outputs_ptr + (token * top_k + choice)[:, None] * features + c[None, :]
        output = tl.load(at, mask=kept, other=0.0).to(tl.float32)
        if weighted:
            mixture = tl.load(mixture_ptr + token * top_k + choice, mask=inside, other=0.0)
            output *= mixture.to(tl.float32)[:, None]
        total += output
    tl.store(mixed_ptr + token[:, None] * features + c[None, :], total, mask=kept)


@triton.jit
def _hidden_gradient_kernel(
    grad_ptr, order_ptr, mixture_ptr, weight_ptr, expanded_ptr, expanded_grad_ptr, hidden_ptr,
    partial_ptr, ends_ptr, num_blocks,
    top_k: tl.constexpr, hidden_features: tl.constexpr, features: tl.constexpr,
    expert_stride: tl.constexpr, row_stride: tl.constexpr, column_stride: tl.constexpr,
    num_experts: tl.constexpr, precision: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """Gradients of gate and up, the weighted hidden layer, and the gradient of its weight."""
    wide: tl.constexpr = (hidden_features + columns - 1) // columns
    expert, row, end, inside = _expert_of_tile(
        tl.program_id(0) // wide, ends_ptr, num_blocks, num_experts, rows
    )
    if not inside:
        return
    r = row + tl.arange(0, rows)
    within = r < end
    r = tl.minimum(r, end - 1)
    place = tl.load(order_ptr + r)
    mixture = tl.load(mixture_ptr + place).to(tl.float32)
    token = (place // top_k).to(tl.int64)
    k = tl.arange(0, depth)
    grad_at = grad_ptr + token[:, None] * features + k[None, :]
    column_of_tile = tl.program_id(0) % wide
    c = column_of_tile * columns + tl.arange(0, columns)
    # The matrix transposed: a row for each output.
    weight_at = weight_ptr + expert * expert_stride
    weight_at += k[:, None] * column_stride + (c % hidden_features)[None, :] * row_stride
    total = _product(grad_at, weight_at, column_stride, features, precision, rows, columns, depth)
    kept = within[:, None] & (c < hidden_features)[None, :]
    r = r.to(tl.int64)
    at = r[:, None] * (2 * hidden_features) + c[None, :]
    gate = tl.load(expanded_ptr + at, mask=kept, other=0.0).to(tl.float32)
    up = tl.load(expanded_ptr + hidden_features + at, mask=kept, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    activated = gate * sigmoid
    hidden = activated * up
    # Before it is weighted, the product with the hidden is the gradient of the weight.
    tl.store(partial_ptr + r * wide + column_of_tile, tl.sum(total * hidden, axis=1), mask=within)
    total *= mixture[:, None]
    grad_at = expanded_grad_ptr + at
    tl.store(grad_at, total * up * sigmoid * (1 + gate - activated), mask=kept)
    tl.store(grad_at + hidden_features, total * activated, mask=kept)
    weighted_at = hidden_ptr + r[:, None] * hidden_features + c[None, :]
    tl.store(weighted_at, hidden * mixture[:, None], mask=kept)


@triton.jit
def _weight_gradient_kernel(
    a_ptr, b_ptr, order_ptr, out_ptr, ends_ptr, num_blocks,
    top_k: tl.constexpr, a_of_tokens: tl.constexpr, b_of_tokens: tl.constexpr,
    a_features: tl.constexpr, b_features: tl.constexpr,
    expert_stride: tl.constexpr, row_stride: tl.constexpr, column_stride: tl.constexpr,
    precision: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """``aᵀ @ b`` over the rows of one expert; zeros if it has none."""
    wide: tl.constexpr = (b_features + columns - 1) // columns
    expert = tl.program_id(1)
    end = tl.load(ends_ptr + (expert + 1) * num_blocks - 1)
    begin = tl.load(ends_ptr + expert * num_blocks - 1, mask=expert > 0, other=0)
    i = (tl.program_id(0) // wide) * rows + tl.arange(0, rows)
    j = (tl.program_id(0) % wide) * columns + tl.arange(0, columns)
    total = tl.zeros((rows, columns), dtype=tl.float32)
    for start in range(begin, end, depth):
        r = start + tl.arange(0, depth)
        kept = r < end
        token = tl.load(order_ptr + r, mask=kept, other=0) // top_k
        a_row = (token if a_of_tokens else r).to(tl.int64)
        b_row = (token if b_of_tokens else r).to(tl.int64)
        a_at = a_ptr + a_row[:, None] * a_features + (i % a_features)[None, :]
        b_at = b_ptr + b_row[:, None] * b_features + (j % b_features)[None, :]
        a = tl.load(a_at, mask=kept[:, None], other=0.0)
        b = tl.load(b_at, mask=kept[:, None], other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision=precision)
    at = out_ptr + expert.to(tl.int64) * expert_stride
    at += i[:, None] * row_stride + j[None, :] * column_stride
    tl.store(at, total, mask=(i < a_features)[:, None] & (j < b_features)[None, :])


@triton.jit
def _route_kernel(
    x_ptr, weight_ptr, mixture_ptr, ids_ptr, scores_ptr, num_tokens,
    features: tl.constexpr, num_experts: tl.constexpr, top_k: tl.constexpr,
    by_distance: tl.constexpr, weighted_by_score: tl.constexpr,
    rows: tl.constexpr, depth: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Scores of all experts, and the best of them, for one block of tokens."""
    token = tl.program_id(0) * rows + tl.arange(0, rows)
    inside = token < num_tokens
    token = tl.minimum(token, num_tokens - 1).to(tl.int64)
    e = tl.arange(0, padded)
    real = e < num_experts
    logits = tl.zeros((rows, padded), dtype=tl.float32)
    x_squares = tl.zeros((rows,), dtype=tl.float32)
    weight_squares = tl.zeros((padded,), dtype=tl.float32)
    for start in range(0, features, depth):
        k = start + tl.arange(0, depth)
        deep = k < features
        x_at = x_ptr + token[:, None] * features + k[None, :]
        weight_at = weight_ptr + e[None, :] * features + k[:, None]
        x = tl.load(x_at, mask=deep[None, :], other=0.0)
        weight = tl.load(weight_at, mask=deep[:, None] & real[None, :], other=0.0).to(x.dtype)
        logits = tl.dot(x, weight, logits, input_precision="tf32x3")
        if by_distance:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
            x_squares += tl.sum(x * x, axis=1)
            weight_squares += tl.sum(weight * weight, axis=0)
    if by_distance:
        squares = x_squares[:, None] + weight_squares[None, :] - 2 * logits
        logits = tl.sqrt(tl.maximum(squares, 0.0))
    logits = tl.where(real[None, :], logits, float("-inf"))
    largest = tl.max(logits, axis=1)
    odds = tl.exp(logits - largest[:, None])
    total = tl.sum(odds, axis=1)
    scores_at = scores_ptr + token[:, None] * num_experts + e[None, :]
    tl.store(scores_at, odds / total[:, None], mask=inside[:, None] & real[None, :])
    if not weighted_by_score:
        total = tl.zeros((rows,), dtype=tl.float32)
        left = logits
        for _ in tl.static_range(top_k):
            best = tl.argmax(left, axis=1)[:, None] == e[None, :]
            total += tl.sum(tl.where(best, odds, 0.0), axis=1)
            left = tl.where(best, float("-inf"), left)
    for choice in tl.static_range(top_k):
        # What is no number may be the largest anywhere, but not beyond the experts.
        best = tl.minimum(tl.argmax(logits, axis=1), num_experts - 1)
        chosen = best[:, None] == e[None, :]
        weight = tl.sum(tl.where(chosen, odds, 0.0), axis=1) / total
        tl.store(mixture_ptr + token * top_k + choice, weight, mask=inside)
        tl.store(ids_ptr + token * top_k + choice, best.to(tl.int64), mask=inside)
        logits = tl.where(chosen, float("-inf"), logits)


class _Sorted(NamedTuple):
    """Choices in order of their experts.

    Attributes
    ----------
    order
        Which choice each row is: token times K plus its place among the token's.
    ends
        For each expert and block of choices, where the rows end; the last block's are the expert's.
    """

    order: Tensor
    ends: Tensor


def _sort(ids_TK: Tensor, num_experts: int) -> _Sorted:
    ids, num_choices = ids_TK.contiguous(), ids_TK.numel()
    block = max(16, 8192 // triton.next_power_of_2(num_experts))
    num_blocks = triton.cdiv(num_choices, block)
    counts = torch.empty(num_experts * num_blocks, dtype=torch.int32, device=ids.device)
    shape = {"num_experts": num_experts, "block": block}
    _count_kernel[(num_blocks,)](ids, counts, num_choices, num_blocks, **shape)
    ends = counts.cumsum(0, dtype=torch.int32)
    order = torch.empty(num_choices, dtype=torch.int32, device=ids.device)
    _place_kernel[(num_blocks,)](ids, counts, ends, order, num_choices, num_blocks, **shape)
    return _Sorted(order, ends.view(num_experts, num_blocks))


def _without_span(tile: Tile) -> dict[str, int]:
    return {name: size for name, size in tile._asdict().items() if name != "span"}


class _Launcher:
    """The kernels over one set of sorted choices."""

    def __init__(self, ids_TK: Tensor, contract_EHO: Tensor) -> None:
        self.num_tokens, self.top_k = ids_TK.shape
        self.num_experts, hidden_features, _ = contract_EHO.shape
        self.order, self.ends = _sort(ids_TK, self.num_experts)
        rows_per_expert = len(self.order) / self.num_experts
        self.tiles = tiles_for(contract_EHO.dtype, rows_per_expert, hidden_features)
        one_part = torch.backends.cuda.matmul.allow_tf32
        self.precision = "tf32" if one_part else "tf32x3"

    def grid(self, tile: Tile, columns: int) -> tuple[int]:
        most_tiles = len(self.order) // tile.rows + self.num_experts
        return (most_tiles * triton.cdiv(columns, tile.columns * tile.span),)

    def expand(self, x_TI: Tensor, weight_EIF: Tensor, expanded_RF: Optional[Tensor]) -> Tensor:
        """The hidden layer ``[R, H]``; gate and up are left in ``expanded_RF``, if there is one."""
        features, hidden_features = weight_EIF.shape[1], weight_EIF.shape[2] // 2
        hidden_RH = x_TI.new_empty(len(self.order), hidden_features)
        tile = self.tiles.expand
        _expand_kernel[self.grid(tile, hidden_features)](
            x_TI, self.order, weight_EIF, hidden_RH, expanded_RF, self.ends, self.ends.shape[1],
            self.top_k, features, hidden_features, *weight_EIF.stride(),
            num_experts=self.num_experts, kept_for_backward=expanded_RF is not None,
            precision=self.precision, **tile._asdict(),
        )  # fmt: skip
        return hidden_RH

    def contract(self, hidden_RH: Tensor, weight_EHO: Tensor) -> Tensor:
        """What each choice gives ``[T * K, O]``, in the order of the tokens."""
        _, hidden_features, features = weight_EHO.shape
        outputs = hidden_RH.new_empty(len(self.order), features)
        tile = self.tiles.contract
        _contract_kernel[self.grid(tile, features)](
            hidden_RH, self.order, weight_EHO, outputs, self.ends, self.ends.shape[1],
            hidden_features, features, *weight_EHO.stride(),
            num_experts=self.num_experts, precision=self.precision, **tile._asdict(),
        )  # fmt: skip
        return outputs

    def mix(self, outputs: Tensor, weights_TK: Optional[Tensor]) -> Tensor:
        """The sum over each token's choices ``[T, O]``."""
        features = outputs.shape[1]
        mixed = outputs.new_empty(self.num_tokens, features)
        rows, columns = 8, 256
        grid = triton.cdiv(self.num_tokens, rows), triton.cdiv(features, columns)
        _mix_kernel[grid](
            outputs, weights_TK, mixed, self.num_tokens, top_k=self.top_k, features=features,
            weighted=weights_TK is not None, rows=rows, columns=columns,
        )  # fmt: skip
        return mixed

    def hidden_gradient(
        self, grad_TO: Tensor, weights_TK: Tensor, weight_EHO: Tensor, expanded_RF: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of the expanded, the weighted hidden layer, and the gradient of the weights."""
        _, hidden_features, features = weight_EHO.shape
        hidden_RH = grad_TO.new_empty(len(self.order), hidden_features)
        expanded_grad_RF = torch.empty_like(expanded_RF)
        tile = self.tiles.expand
        # Five numbers for each of a piece are in registers at once, of which a thread has 255.
        narrow = min(tile.columns, 32 * 32 * tile.num_warps // tile.rows)
        tile = tile._replace(columns=narrow, span=1)
        parts = triton.cdiv(hidden_features, tile.columns)
        partial = torch.empty(len(self.order), parts, device=grad_TO.device)
        _hidden_gradient_kernel[self.grid(tile, hidden_features)](
            grad_TO, self.order, weights_TK, weight_EHO, expanded_RF, expanded_grad_RF, hidden_RH,
            partial, self.ends, self.ends.shape[1],
            self.top_k, hidden_features, features, *weight_EHO.stride(),
            num_experts=self.num_experts, precision=self.precision, **_without_span(tile),
        )  # fmt: skip
        by_choice = torch.empty_like(partial[:, 0]).index_copy_(
            0, self.order.long(), partial.sum(dim=1)
        )
        return expanded_grad_RF, hidden_RH, by_choice.view_as(weights_TK).to(weights_TK.dtype)

    def weight_gradient(
        self, a: Tensor, b: Tensor, weight: Tensor, a_of_tokens: bool, b_of_tokens: bool
    ) -> Tensor:
        """``aᵀ @ b`` of each expert's rows, in memory as the weight.

        Rows of ``a`` and ``b`` are choices in order of their experts, or tokens.
        """
        gradient, tile = torch.empty_like(weight), self.tiles.gradient
        pieces = triton.cdiv(a.shape[1], tile.rows) * triton.cdiv(b.shape[1], tile.columns)
        _weight_gradient_kernel[(pieces, self.num_experts)](
            a, b, self.order, gradient, self.ends, self.ends.shape[1],
            self.top_k, a_of_tokens, b_of_tokens, a.shape[1], b.shape[1], *gradient.stride(),
            precision=self.precision, **_without_span(tile),
        )  # fmt: skip
        return gradient


class _GatedFFN(torch.autograd.Function):
    """The layer with its gradients, of the weights for all experts at once."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weights_TK: Tensor,
        ids_TK: Tensor,
        expand_EIF: Tensor,
        contract_EFO: Tensor,
    ) -> Tensor:
        launch = _Launcher(ids_TK, contract_EFO)
        expanded_RF = x_TI.new_empty(ids_TK.numel(), expand_EIF.shape[-1])
        hidden_RH = launch.expand(x_TI, expand_EIF, expanded_RF)
        ctx.launch = launch
        ctx.save_for_backward(x_TI, weights_TK, expand_EIF, contract_EFO, expanded_RF)
        return launch.mix(launch.contract(hidden_RH, contract_EFO), weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Optional[Tensor], ...]:
        x_TI, weights_TK, expand_EIF, contract_EFO, expanded_RF = ctx.saved_tensors
        launch, grad_TO = ctx.launch, grad_TO.contiguous()
        # Weights that are frozen, as in fine-tuning, want none.
        needs_x, _, _, needs_expand, needs_contract = ctx.needs_input_grad
        expanded_grad_RF, hidden_RH, grad_weights_TK = launch.hidden_gradient(
            grad_TO, weights_TK, contract_EFO, expanded_RF
        )
        grad_x = grad_expand = grad_contract = None
        if needs_x:
            grad_x = launch.mix(launch.contract(expanded_grad_RF, expand_EIF.mT), None)
        if needs_expand:
            grad_expand = launch.weight_gradient(
                x_TI, expanded_grad_RF, expand_EIF, a_of_tokens=True, b_of_tokens=False
            )
        if needs_contract:
            grad_contract = launch.weight_gradient(
                hidden_RH, grad_TO, contract_EFO, a_of_tokens=False, b_of_tokens=True
            )
        return grad_x, grad_weights_TK, None, grad_expand, grad_contract


def gated_ffn(
    x_TI: Tensor, weights_TK: Tensor, ids_TK: Tensor, expand_EIF: Tensor, contract_EFO: Tensor
) -> Tensor:
    """As ``Backend.gated_ffn``, for at least one token, in one of ``DTYPES``."""
    x_TI, weights_TK = x_TI.contiguous(), weights_TK.contiguous()
    inputs = x_TI, weights_TK, ids_TK, expand_EIF, contract_EFO
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _GatedFFN.apply(*inputs)
    launch = _Launcher(ids_TK, contract_EFO)
    outputs = launch.contract(launch.expand(x_TI, expand_EIF, None), contract_EFO)
    return launch.mix(outputs, weights_TK)


def route(x_TI: Tensor, scoring: Scoring, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and numbers of the chosen experts, and scores, in one kernel; without gradients."""
    x_TI, weight_EI = x_TI.contiguous(), scoring.weight_EI.contiguous()
    num_tokens, features = x_TI.shape
    num_experts = len(weight_EI)
    weights_TK = x_TI.new_empty(num_tokens, top_k)
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.long, device=x_TI.device)
    scores_TE = x_TI.new_empty(num_tokens, num_experts)
    rows = 16 if num_tokens <= 4096 else 64
    _route_kernel[(triton.cdiv(num_tokens, rows),)](
        x_TI, weight_EI, weights_TK, ids_TK, scores_TE, num_tokens, features=features,
        num_experts=num_experts, top_k=top_k, by_distance=scoring.by_distance,
        weighted_by_score=scoring.weighted_by_score, rows=rows, depth=64,
        padded=max(16, triton.next_power_of_2(num_experts)), num_stages=4,
    )  # fmt: skip
    return weights_TK, ids_TK, scores_TE
