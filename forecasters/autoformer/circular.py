"""Circular correlation and convolution along time, by Fourier transforms.

The gradient of each is again one of the two, so that backward passes take real transforms, too,
instead of the complex ones that autograd would derive. Gradients of gradients are not there. Half
precision is transformed in float32.

Shape suffixes: B series, T tokens, A heads, D features of a head, F frequencies.
"""

from typing import Any, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def circular_correlation(query_BTAD: Tensor, key_BTAD: Tensor) -> Tensor:
    """How much the query resembles the key moved by each delay ``[B, T, A]``.

    ``r[τ] = Σₜ ⟨query[t], key[t - τ]⟩``, the key continued periodically.
    """
    result: Tensor = _Correlation.apply(query_BTAD, key_BTAD)
    return result


def circular_convolution(weights_BTA: Tensor, value_BTAD: Tensor) -> Tensor:
    """The sum of the values moved by each delay and weighted ``[B, T, A, D]``.

    ``y[t] = Σ_τ weights[τ] · value[t - τ]``, the values continued periodically.
    """
    result: Tensor = _Convolution.apply(weights_BTA, value_BTAD)
    return result


class _Correlation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor) -> Tensor:
        query_F, key_F = _spectrum(query), _spectrum(key)
        ctx.save_for_backward(query_F, key_F)
        ctx.length, ctx.types = query.shape[1], (query.dtype, key.dtype)
        return _signal(_correlate(query_F, key_F), ctx.length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Tensor, Tensor]:
        query_F, key_F = ctx.saved_tensors
        weights_F = _spectrum(gradient).unsqueeze(-1)
        return (
            _signal(key_F * weights_F, ctx.length).to(ctx.types[0]),
            _signal(query_F * weights_F.conj(), ctx.length).to(ctx.types[1]),
        )


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, value: Tensor) -> Tensor:
        weights_F, value_F = _spectrum(weights).unsqueeze(-1), _spectrum(value)
        ctx.save_for_backward(weights_F, value_F)
        ctx.length, ctx.types = value.shape[1], (weights.dtype, value.dtype)
        return _signal(value_F * weights_F, ctx.length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Tensor, Tensor]:
        weights_F, value_F = ctx.saved_tensors
        gradient_F = _spectrum(gradient)
        return (
            _signal(_correlate(gradient_F, value_F), ctx.length).to(ctx.types[0]),
            _signal(gradient_F * weights_F.conj(), ctx.length).to(ctx.types[1]),
        )


def _correlate(query_BFAD: Tensor, key_BFAD: Tensor) -> Tensor:
    return (query_BFAD * key_BFAD.conj()).sum(dim=-1)


def _spectrum(x: Tensor) -> Tensor:
    # torch transforms no bfloat16, and float16 only where the length is a power of two.
    return torch.fft.rfft(x if x.dtype == torch.float64 else x.float(), dim=1)


def _signal(spectrum: Tensor, length: int) -> Tensor:
    return torch.fft.irfft(spectrum, n=length, dim=1)
