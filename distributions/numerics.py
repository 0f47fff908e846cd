"""Special functions that torch lacks, and inverses of increasing functions."""

from typing import Any, Callable, List, Optional, Sequence, Tuple

import numpy as np
import torch
from scipy import special as scipy_special
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ArrayFunction = Callable[..., np.ndarray]

_RELATIVE_STEP = 1e-4
_MOST_ITERATIONS = 200
_SMALLEST_WIDTH = 4 * float(np.finfo(float).eps)


class _OfArrays(torch.autograd.Function):
    """A function of numpy arrays within a graph of tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        function: ArrayFunction,
        derivatives: Sequence[Optional[ArrayFunction]],
        *arguments: Tensor,
    ) -> Tensor:
        ctx.function, ctx.derivatives = function, derivatives
        ctx.save_for_backward(*arguments)
        return _evaluate(function, arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Optional[Tensor], ...]:
        arguments = ctx.saved_tensors
        gradients: List[Optional[Tensor]] = []
        for position, argument in enumerate(arguments):
            if not ctx.needs_input_grad[2 + position]:
                gradients.append(None)
                continue
            slope = _evaluate(
                ctx.derivatives[position] or _central_difference(ctx.function, position), arguments
            )
            gradients.append((gradient * slope).sum_to_size(argument.shape))
        return None, None, *gradients


def _evaluate(function: ArrayFunction, arguments: Sequence[Tensor]) -> Tensor:
    first = arguments[0]
    with np.errstate(all="ignore"):
        values = function(*(a.detach().cpu().to(torch.float64).numpy() for a in arguments))
    return torch.as_tensor(values, dtype=_common_dtype(arguments), device=first.device)


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _central_difference(function: ArrayFunction, position: int) -> ArrayFunction:
    def slope(*arguments: np.ndarray) -> np.ndarray:
        step = _RELATIVE_STEP * np.maximum(np.abs(arguments[position]), _RELATIVE_STEP)
        above, below = list(arguments), list(arguments)
        above[position] = arguments[position] + step
        below[position] = arguments[position] - step
        return (function(*above) - function(*below)) / (2 * step)

    return slope


def of_arrays(
    function: ArrayFunction,
    *arguments: Tensor,
    derivatives: Optional[Sequence[Optional[ArrayFunction]]] = None,
) -> Tensor:
    """Apply a function of numpy arrays to tensors, in double precision on the CPU.

    Parameters
    ----------
    function
        Elementwise, with broadcasting.
    arguments
        Tensors whose shapes broadcast.
    derivatives
        For each argument its partial derivative, a function of the same arguments. Where it is
        ``None``, central differences take its place; then the argument must not reach the edge
        of the function's domain.

    Returns
    -------
    Tensor
        In the arguments' dtype and on their device, differentiable.
    """
    return _OfArrays.apply(function, derivatives or [None] * len(arguments), *arguments)


def _density_of_beta(a: np.ndarray, b: np.ndarray, x: np.ndarray) -> np.ndarray:
    inside = np.clip(x, np.finfo(float).tiny, 1.0 - np.finfo(float).epsneg)
    logarithm = scipy_special.xlogy(a - 1.0, inside) + scipy_special.xlog1py(b - 1.0, -inside)
    return _bounded_exp(logarithm - scipy_special.betaln(a, b))


def _density_of_gamma(a: np.ndarray, x: np.ndarray) -> np.ndarray:
    inside = np.maximum(x, np.finfo(float).tiny)
    return _bounded_exp(scipy_special.xlogy(a - 1.0, inside) - inside - scipy_special.gammaln(a))


def _bounded_exp(exponent: np.ndarray) -> np.ndarray:
    """The exponential, held where single precision would become infinite."""
    return np.exp(np.minimum(exponent, 80.0))


def betainc(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Regularised incomplete beta function, differentiable in all arguments."""
    derivatives = None, None, _density_of_beta
    return of_arrays(scipy_special.betainc, a, b, x, derivatives=derivatives)


def gammainc(a: Tensor, x: Tensor) -> Tensor:
    """Regularised lower incomplete gamma function, differentiable in both arguments."""
    return of_arrays(scipy_special.gammainc, a, x, derivatives=(None, _density_of_gamma))


def log_ndtr(x: Tensor) -> Tensor:
    """Logarithm of the standard normal cdf, with gradients that stay finite in the lower tail."""
    far = x < -1.0
    below = torch.where(far, x, -1.0)
    above = torch.where(far, -1.0, x)
    tail = torch.log(0.5 * torch.special.erfcx(below * -(0.5**0.5))) - 0.5 * below.square()
    return torch.where(far, tail, torch.log1p(-0.5 * torch.special.erfc(above * 0.5**0.5)))


def softplus_relative(raw: Tensor) -> Tensor:
    """A positive number that is 1 where the network says 0."""
    return F.softplus(raw) / F.softplus(torch.zeros((), dtype=raw.dtype, device=raw.device))


Function = Callable[[Tensor], Tensor]
FunctionWithSlope = Callable[[Tensor], Tuple[Tensor, Tensor]]


def solve_increasing(
    functions: Callable[[Tensor], FunctionWithSlope],
    target: Tensor,
    low: Tensor,
    high: Tensor,
    start: Tensor,
    tolerance: float,
) -> Tensor:
    """Where increasing functions reach their targets: Newton's steps within a bracket.

    Parameters
    ----------
    functions
        From the numbers of some of the elements to their functions, value and slope together.
    target
        What to reach, ``[element]``.
    low, high
        ``function(low) <= target <= function(high)``.
    start
        Where to begin, between them.
    tolerance
        Stop where the target is met to this absolute error, or the bracket has no width left.

    Returns
    -------
    Tensor
        float64; at a jump over the target, the upper side.
    """
    target, low, high, x = (t.to(torch.float64) for t in (target, low, high, start))
    elements = torch.arange(len(target), device=target.device)
    solution = high.clone()
    function = functions(elements)
    width = high - low
    for iteration in range(_MOST_ITERATIONS):
        value, slope = function(x)
        excess = value - target
        reached = excess.abs() <= tolerance
        high = torch.where((excess >= 0) | reached, x, high)
        low = torch.where(excess < 0, x, low)
        settled = reached | (high - low <= _SMALLEST_WIDTH * high.abs())
        newton = x - excess / slope
        # Where the bracket shrinks too slowly, as beside a narrow peak, halve it.
        stuck = (iteration % 3 == 2) & (high - low > 0.5 * width)
        if iteration % 3 == 2:
            width = high - low
        usable = (newton > low) & (newton < high) & ~stuck
        x = torch.where(usable, newton, _middle(low, high))
        x = torch.where(settled, high, x)
        if settled.all():
            break
        if 2 * settled.sum() > len(settled):
            solution[elements] = high
            rest = ~settled
            elements, target, low, high, x, width = (
                t[rest] for t in (elements, target, low, high, x, width)
            )
            function = functions(elements)
    solution[elements] = high
    return solution


def _middle(low: Tensor, high: Tensor) -> Tensor:
    """The geometric mean of ends of one sign and different magnitude, else the arithmetic one."""
    product = low * high
    apart = (product > 0) & ((high > 2 * low) | (low < 2 * high))
    geometric = torch.where(apart, product, 1.0).sqrt().copysign(low)
    return torch.where(apart, geometric, 0.5 * (low + high))


def smallest_count(
    cdfs: Callable[[Tensor], Function], level: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """The smallest whole numbers whose cdf reaches a level.

    Parameters
    ----------
    cdfs
        From the numbers of some of the elements to their cdf.
    level
        ``[element]``.
    low, high
        Whole numbers: at the first the cdf is below the level, at the second not.
    """
    elements = torch.arange(len(level), device=level.device)
    solution = high.clone()
    cdf = cdfs(elements)
    while len(elements):
        middle = torch.floor(0.5 * (low + high))
        reached = cdf(middle) >= level
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
        rest = (high - low > 1) & high.isfinite()
        if 2 * rest.sum() < len(rest):
            solution[elements] = high
            elements, level, low, high = (t[rest] for t in (elements, level, low, high))
            if len(elements):
                cdf = cdfs(elements)
    return solution
