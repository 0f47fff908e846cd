"""MoLE as a few matrices, for devices that are told of every operation.

Patches, the moving average, the residual block's second layer and a single channel's affine map
are all linear, so that each expert is one matrix from the standardised lookback to the head's raw
parameters (and one more through a ReLU where it is an RMLP). Shape suffixes as in :mod:`.network`;
A numbers that an expert reads, F those and what else the router reads, U hidden units, Q raw
parameters of the horizon.
"""

from typing import List, Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...backends import LinearMixture
from ..moe import MLPRouter


def fold_patches(weight_EIO: Tensor, patches_in: int, patches_out: int, patch_size: int) -> Tensor:
    """A matrix over patches as one over steps, which keeps the phases within a patch apart.

    Parameters
    ----------
    weight_EIO
        ``[…, X * patches_in, Y * patches_out]``; X and Y any number of blocks.
    patches_in, patches_out, patch_size
        Number of patches of each block, and their steps.

    Returns
    -------
    Tensor
        ``[…, X * patches_in * patch_size, Y * patches_out * patch_size]``.
    """
    blocks = weight_EIO.unflatten(-1, (-1, patches_out)).unflatten(-3, (-1, patches_in))
    phases = torch.eye(patch_size, dtype=weight_EIO.dtype, device=weight_EIO.device)
    steps = torch.einsum("...xnym,pq->...xnpymq", blocks, phases)
    return steps.flatten(-6, -4).flatten(-3)


class MatrixBuilder:
    """Makes the matrices of experts of one patch size.

    Parameters
    ----------
    patch_size, context_length, prediction_length
        P, L and H.
    individual
        Whether channels have weights of their own.
    """

    def __init__(
        self, patch_size: int, context_length: int, prediction_length: int, individual: bool
    ) -> None:
        self.patch_size = patch_size
        self.context = context_length
        self.horizon = prediction_length
        self.context_patches = -(-context_length // patch_size)
        self.horizon_patches = -(-prediction_length // patch_size)
        self.individual = individual

    def grouped(self, weight: Tensor) -> Tensor:
        """With a first dimension for the channels, of 1 where all have the same."""
        return weight if self.individual else weight.unsqueeze(0)

    def inputs_as_steps(self, weight_GEIO: Tensor) -> Tensor:
        """Of rows for the padded patches of each component, those of steps of the lookback."""
        padded = self.context_patches * self.patch_size
        steps = weight_GEIO.unflatten(-2, (-1, padded))
        return steps[..., padded - self.context :, :].flatten(-3, -2)

    def direct(self, weight_GEIO: Tensor) -> Tensor:
        """``[G, E, A, Q]``."""
        folded = fold_patches(
            weight_GEIO, self.context_patches, self.horizon_patches, self.patch_size
        )
        return self.inputs_as_steps(self.outputs(folded))

    def outputs(self, weight_GEIO: Tensor) -> Tensor:
        """Of columns for whole patches of each raw parameter, those of the horizon."""
        padded = self.horizon_patches * self.patch_size
        return weight_GEIO.unflatten(-1, (-1, padded))[..., : self.horizon].flatten(-2)

    def bias(self, bias_GEO: Tensor) -> Tensor:
        """``[G, E, 1, Q]``; a patch's steps share it."""
        steps = bias_GEO.repeat_interleave(self.patch_size, dim=-1)
        return self.outputs(steps.unsqueeze(-2))


def fold_experts(
    build: MatrixBuilder,
    linear: Tuple[Tensor, Tensor],
    residual: Optional[Tuple[Tensor, Tensor, Tensor, Tensor]],
    trend_matrix: Optional[Tensor],
    affine: Optional[Tuple[Tensor, Tensor]],
) -> LinearMixture:
    """Experts without a router; the last row of what reads the input is the bias.

    Parameters
    ----------
    build
        Sizes.
    linear
        Weight and bias of the experts.
    residual
        Weight and bias of the residual block's two layers.
    trend_matrix
        Of the moving average ``[L, L]``, if experts read a season and a trend.
    affine
        Shift and gain of the standardised series, if they are to be folded in.
    """
    weight, bias = (build.grouped(parameter) for parameter in linear)
    direct, constant = build.direct(weight), build.bias(bias)
    hidden: Optional[Tensor] = None
    contract: Optional[Tensor] = None
    if residual is not None:
        expand, expand_bias, back, back_bias = map(build.grouped, residual)
        # x + ReLU(x W₁) W₂, then the linear experts, of which W₂'s product needs no ReLU.
        hidden = build.inputs_as_steps(
            fold_patches(expand, build.context_patches, 1, build.patch_size)
        )
        contract = build.outputs(
            fold_patches(back @ weight, 1, build.horizon_patches, build.patch_size)
        )
        constant = constant + build.bias((back_bias.unsqueeze(-2) @ weight).squeeze(-2))
        hidden_bias = expand_bias.repeat_interleave(build.patch_size, dim=-1).unsqueeze(-2)
    context = build.context
    if trend_matrix is not None:
        season, trend, rest = direct.tensor_split([context, 2 * context], dim=-2)
        direct = torch.cat([season + trend_matrix @ (trend - season), rest], dim=-2)
    if affine is not None:
        shift, gain = affine
        constant = constant + shift * direct[..., :context, :].sum(dim=-2, keepdim=True)
        direct = _scale_rows(direct, context, gain)
        if hidden is not None:
            hidden_bias = hidden_bias + shift * hidden[..., :context, :].sum(dim=-2, keepdim=True)
            hidden = _scale_rows(hidden, context, gain)
    direct = torch.cat([direct, constant], dim=-2)
    if hidden is not None:
        hidden = torch.cat([hidden, hidden_bias], dim=-2)
    return LinearMixture(None, None, direct, hidden, contract)


def fold_router(router: MLPRouter, mixture: LinearMixture, columns: List[int]) -> LinearMixture:
    """Let a router read the experts' input, and experts what only the router reads.

    Parameters
    ----------
    router
        The router.
    mixture
        The experts.
    columns
        For each feature of the router, which number of the input it is; the last is 1.
    """
    width = max(columns[-1] + 1, mixture.direct_GEFO.shape[-2])
    weight_FR, bias_R = router.hidden.weight.T, router.hidden.bias
    hidden = weight_FR.new_zeros(width, weight_FR.shape[-1] + 1)
    hidden[columns[:-1], :-1] = weight_FR
    hidden[columns[-1], :-1] = bias_R
    # One more unit, which is always 1, for the output's bias.
    hidden[columns[-1], -1] = 1.0
    output = torch.cat([router.output.weight.T, router.output.bias.unsqueeze(0)])
    # Where channels have logits of their own, each is a group.
    output_GRE = output.unflatten(-1, (router.num_channels or 1, -1)).movedim(1, 0)

    def widened(matrix: Optional[Tensor]) -> Optional[Tensor]:
        if matrix is None:
            return None
        rows = matrix.shape[-2] - 1
        more = F.pad(matrix[..., :-1, :], (0, 0, 0, width - 1 - rows))
        return torch.cat([more, matrix[..., -1:, :]], dim=-2)

    direct = widened(mixture.direct_GEFO)
    assert direct is not None
    return mixture._replace(
        router_hidden_GFR=hidden.unsqueeze(0),
        router_output_GRE=output_GRE,
        direct_GEFO=direct,
        hidden_GEFH=widened(mixture.hidden_GEFH),
    )


def _scale_rows(weight: Tensor, rows: int, gain: Tensor) -> Tensor:
    return torch.cat([weight[..., :rows, :] * gain, weight[..., rows:, :]], dim=-2)
