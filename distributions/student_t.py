"""Student's t: GluonTS's head with its likelihood and gradient in closed form."""

import math
from typing import Any, Optional, Tuple

import torch
from gluonts.torch.distributions import StudentTOutput as GluonTSStudentTOutput
from torch import Tensor
from torch.autograd.function import once_differentiable


class _NegativeLogLikelihood(torch.autograd.Function):
    """Of a value under Student's t, with its derivatives written out.

    With ``z = (value - loc) / scale`` it is ``ln Γ(df / 2) - ln Γ((df + 1) / 2) + ln(df π) / 2 +
    ln scale + (df + 1) / 2 · ln(1 + z² / df)``. All tensors have one shape.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, df: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        z = (value - loc) / scale
        ratio = z.square() / df
        tail = torch.log1p(ratio)
        above = 0.5 * (df + 1.0)
        ctx.save_for_backward(df, scale, z, ratio, tail, above)
        constant = torch.lgamma(0.5 * df) - torch.lgamma(above)
        return constant + torch.log((math.pi * df).sqrt() * scale) + above * tail

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Optional[Tensor], ...]:
        df, scale, z, ratio, tail, above = ctx.saved_tensors
        pull = 2.0 * above / (df + df * ratio)
        by_scale = gradient / scale
        d_loc = by_scale * pull * -z
        d_scale = by_scale + d_loc * z
        slope = torch.digamma(0.5 * df) - torch.digamma(above) + (1.0 - pull * z.square()) / df
        d_df = 0.5 * gradient * (slope + tail)
        d_value = -d_loc if ctx.needs_input_grad[0] else None
        return d_value, d_df, d_loc, d_scale


class StudentTOutput(GluonTSStudentTOutput):
    """GluonTS's head, whose loss is computed without a distribution object.

    Values, gradients and parameters are those of GluonTS's head.
    """

    def loss(
        self,
        target: Tensor,
        distr_args: Tuple[Tensor, ...],
        loc: Optional[Tensor] = None,
        scale: Optional[Tensor] = None,
    ) -> Tensor:
        """Negative log-likelihood per value, same shape as ``target``.

        Parameters
        ----------
        target
            ``[batch, time, …]``.
        distr_args
            Degrees of freedom, location and scale, each of a shape that broadcasts with it.
        loc, scale
            Shift and factor of the whole distribution; ``None`` for 0 and 1.
        """
        if self.beta > 0.0:
            return super().loss(target, distr_args, loc=loc, scale=scale)
        df, mean, spread = distr_args
        if scale is not None:
            mean, spread = mean * scale, spread * scale
        if loc is not None:
            mean = mean + loc
        tensors = target, df, mean, spread
        if len({tensor.shape for tensor in tensors}) > 1:
            tensors = torch.broadcast_tensors(*tensors)
        return _NegativeLogLikelihood.apply(*tensors)
