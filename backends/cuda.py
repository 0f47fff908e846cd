"""Gated experts on CUDA in two kernels, without a copy of the groups and without waiting.

Rows grouped by expert are worked through in tiles of one expert each. How many tiles there are is
only bounded on the host, so that nothing is waited for; those too many end at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS, _DEPTH = 32, 64, 32


@triton.jit
def _expert_of_tile(
    tile, first_tile_ptr, first_row_ptr, num_experts: tl.constexpr, rows: tl.constexpr
):
    """The expert that a tile belongs to, its first row and the expert's end."""
    experts = tl.arange(0, triton.next_power_of_2(num_experts))
    last_tile = tl.load(first_tile_ptr + 1 + experts, mask=experts < num_experts, other=2**30)
    expert = tl.sum((last_tile <= tile).to(tl.int32), axis=0)
    inside = expert < num_experts
    expert = tl.minimum(expert, num_experts - 1)
    begin = tl.load(first_row_ptr + expert)
    row = begin + (tile - tl.load(first_tile_ptr + expert)) * rows
    return expert.to(tl.int64), row, tl.load(first_row_ptr + expert + 1), inside


@triton.jit
def _expand_kernel(
    x_ptr, token_ptr, weight_ptr, hidden_ptr, first_tile_ptr, first_row_ptr,
    features: tl.constexpr, hidden_features: tl.constexpr,
    expert_stride: tl.constexpr, row_stride: tl.constexpr, column_stride: tl.constexpr,
    num_experts: tl.constexpr, precision: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """``SiLU(x @ gate) * (x @ up)`` of the rows of one tile, gathered from the tokens."""
    expert, row, end, inside = _expert_of_tile(
        tl.program_id(0), first_tile_ptr, first_row_ptr, num_experts, rows
    )
    if not inside:
        return
    r = row + tl.arange(0, rows)
    kept = r < end
    token = tl.load(token_ptr + r, mask=kept, other=0).to(tl.int64)
    c = tl.program_id(1) * columns + tl.arange(0, columns)
    wide = c < hidden_features
    k = tl.arange(0, depth)
    x_at = x_ptr + token[:, None] * features + k[None, :]
    weight_at = weight_ptr + expert * expert_stride
    weight_at += k[:, None] * row_stride + c[None, :] * column_stride
    up_at = weight_at + hidden_features * column_stride
    gate = tl.zeros((rows, columns), dtype=tl.float32)
    up = tl.zeros((rows, columns), dtype=tl.float32)
    for start in range(0, features, depth):
        deep = start + k < features
        x = tl.load(x_at + start, mask=kept[:, None] & deep[None, :], other=0.0)
        within = deep[:, None] & wide[None, :]
        first = tl.load(weight_at + start * row_stride, mask=within, other=0.0)
        second = tl.load(up_at + start * row_stride, mask=within, other=0.0)
        gate = tl.dot(x, first, gate, input_precision=precision)
        up = tl.dot(x, second, up, input_precision=precision)
    hidden = gate * tl.sigmoid(gate) * up
    at = hidden_ptr + r[:, None].to(tl.int64) * hidden_features + c[None, :]
    tl.store(at, hidden, mask=kept[:, None] & wide[None, :])


@triton.jit
def _contract_kernel(
    hidden_ptr, order_ptr, mixture_ptr, weight_ptr, out_ptr, first_tile_ptr, first_row_ptr,
    hidden_features: tl.constexpr, features: tl.constexpr,
    expert_stride: tl.constexpr, row_stride: tl.constexpr, column_stride: tl.constexpr,
    num_experts: tl.constexpr, precision: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """``hidden @ contract``, weighted, of the rows of one tile, written where they came from."""
    expert, row, end, inside = _expert_of_tile(
        tl.program_id(0), first_tile_ptr, first_row_ptr, num_experts, rows
    )
    if not inside:
        return
    r = row + tl.arange(0, rows)
    kept = r < end
    place = tl.load(order_ptr + r, mask=kept, other=0)
    mixture = tl.load(mixture_ptr + place, mask=kept, other=0.0)
    c = tl.program_id(1) * columns + tl.arange(0, columns)
    wide = c < features
    k = tl.arange(0, depth)
    hidden_at = hidden_ptr + r[:, None].to(tl.int64) * hidden_features + k[None, :]
    weight_at = weight_ptr + expert * expert_stride
    weight_at += k[:, None] * row_stride + c[None, :] * column_stride
    total = tl.zeros((rows, columns), dtype=tl.float32)
    for start in range(0, hidden_features, depth):
        deep = start + k < hidden_features
        hidden = tl.load(hidden_at + start, mask=kept[:, None] & deep[None, :], other=0.0)
        within = deep[:, None] & wide[None, :]
        weight = tl.load(weight_at + start * row_stride, mask=within, other=0.0)
        total = tl.dot(hidden, weight, total, input_precision=precision)
    at = out_ptr + place[:, None].to(tl.int64) * features + c[None, :]
    tl.store(at, total * mixture[:, None], mask=kept[:, None] & wide[None, :])


def gated_ffn(
    x_TI: Tensor, weights_TK: Tensor, ids_TK: Tensor, expand_EIF: Tensor, contract_EFO: Tensor
) -> Tensor:
    """As ``Backend.gated_ffn``, float32, without gradients.

    Products are of three TF32 parts each, as exact as those of float32 (Ootomo & Yokota 2022);
    of one where torch is allowed TF32.
    """
    num_experts, features = expand_EIF.shape[:2]
    hidden_features, top_k = contract_EFO.shape[1], ids_TK.shape[-1]
    ids = ids_TK.flatten()
    num_rows = len(ids)
    order = ids.argsort()
    counts = torch.zeros(num_experts, dtype=torch.int32, device=ids.device)
    counts.scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
    tables = torch.zeros(2, num_experts + 1, dtype=torch.int32, device=ids.device)
    per_expert = torch.stack([(counts + _ROWS - 1) // _ROWS, counts])
    torch.cumsum(per_expert, dim=1, dtype=torch.int32, out=tables[:, 1:])
    first_tile, first_row = tables
    x = x_TI.contiguous()
    hidden = x.new_empty(num_rows, hidden_features)
    out_features = contract_EFO.shape[2]
    outputs = x.new_empty(num_rows, out_features)
    num_tiles = num_rows // _ROWS + num_experts
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    shape = {"rows": _ROWS, "columns": _COLUMNS, "depth": _DEPTH}
    _expand_kernel[(num_tiles, triton.cdiv(hidden_features, _COLUMNS))](
        x, (order // top_k).int(), expand_EIF, hidden, first_tile, first_row,
        features, hidden_features, *expand_EIF.stride(),
        num_experts=num_experts, precision=precision, **shape,
    )  # fmt: skip
    _contract_kernel[(num_tiles, triton.cdiv(out_features, _COLUMNS))](
        hidden, order.int(), weights_TK.contiguous(), contract_EFO, outputs, first_tile, first_row,
        hidden_features, out_features, *contract_EFO.stride(),
        num_experts=num_experts, precision=precision, **shape,
    )  # fmt: skip
    return outputs.unflatten(0, (-1, top_k)).sum(dim=1)
