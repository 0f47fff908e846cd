"""Gated experts and routing for the tests of several implementations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """The arguments of ``gated_ffn``, in order."""

    x: Tensor
    weights: Tensor
    ids: Tensor
    expand: Tensor
    contract: Tensor


def problem(
    tokens: int,
    experts: int,
    top_k: int,
    features: int = 3,
    hidden: int = 4,
    outputs: int = 2,
    *,
    busy: int | None = None,
    by_output: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Random experts and routing, of which only ``busy`` experts are ever chosen.

    ``by_output`` stores weights as ``GatedExperts`` does, the inputs of an output side by side.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    chosen_from = torch.randperm(experts, generator=generator)[: busy or experts]
    order = torch.rand(tokens, len(chosen_from), generator=generator).argsort(dim=-1)
    weights = [
        normal(experts, features, 2 * hidden) / features**0.5,
        normal(experts, hidden, outputs) / hidden**0.5,
    ]
    if by_output:
        weights = [weight.mT.contiguous().mT for weight in weights]
    return Problem(
        normal(tokens, features),
        normal(tokens, top_k).softmax(dim=-1),
        chosen_from[order[:, :top_k]],
        *weights,
    )
