"""MOIRAI-MoE's network (Liu et al. 2024, arXiv 2410.10469).

Shape suffixes: B series, T steps in time, C variates (of the target, then known covariates, then
past ones), L patches, P steps of a patch, D features, S tokens, K raw head parameters.
"""

import math
from typing import Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...distributions import window_loss
from ..features import WindowFeatures
from ..fields import FEAT_DYNAMIC_REAL, PAST_FEAT_DYNAMIC_REAL
from ..moe import Routing
from ..network import ForecastNetwork, Mixture, NetworkOutput
from ..scaling import WindowScaler
from .config import MoiraiMoEConfig
from .layers import KeysAndValues, RMSNorm, Rotation, TransformerLayer, Visibility
from .packing import Slots, find_packing

_SMALLEST_PREFIX = 0.3
_ENOUGH_PATCHES = 4


class Variates(NamedTuple):
    """Standardised series and covariates, cut into patches.

    Attributes
    ----------
    patches
        ``[B, L, C, P]``.
    present
        Which patches are none of the padding before a series ``[B, L]``; ``None`` if all are.
    loc, scale
        Of the target ``[B, 1, C]``.
    """

    patches: Tensor
    present: Optional[Tensor]
    loc: Tensor
    scale: Tensor

    def without_last(self) -> "Variates":
        """Without the last patch, after which nothing is told in training."""
        present = None if self.present is None else self.present[:, :-1]
        return self._replace(patches=self.patches[:, :-1], present=present)


class PatchLinear(nn.Module):
    """A linear map of its own for each patch size, in one tensor as in the published weights.

    Parameters
    ----------
    num_sizes, in_features, out_features
        Number of patch sizes, and features for the largest.
    """

    def __init__(self, num_sizes: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_sizes, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_sizes, out_features))
        bound = 1.0 / math.sqrt(in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, size: int) -> Tensor:
        """``[…, out]`` for ``[…, in]``, or less than ``in`` for smaller patches."""
        return F.linear(x, self.weight[size, :, : x.shape[-1]], self.bias[size])


class MoiraiMoENetwork(ForecastNetwork):
    """A decoder-only transformer over patches, with sparse experts.

    Parameters
    ----------
    config
        All settings.
    """

    def __init__(self, config: MoiraiMoEConfig) -> None:
        super().__init__(config, forecasts_lead_time=True)
        sizes = len(config.trained_patch_sizes)
        largest, width = max(config.trained_patch_sizes), config.d_model
        backend = self.backend
        self.value_projection = PatchLinear(sizes, largest, width)
        self.residual_projection = PatchLinear(sizes, largest, width)
        self.feature_projection = PatchLinear(sizes, width, width)
        self.layers = nn.ModuleList(
            TransformerLayer(config, backend) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(width)
        # Rows of one parameter lie together, a row for each step of the largest patch.
        self.parameter_projection = PatchLinear(
            sizes, width, self.parameter_head.in_features * largest
        )
        self.static_projection: Optional[nn.Linear] = None
        if self.features.num_static:
            self.static_projection = nn.Linear(self.features.num_static, width, bias=False)
            nn.init.zeros_(self.static_projection.weight)

    @classmethod
    def on_meta(cls, config: MoiraiMoEConfig) -> "MoiraiMoENetwork":
        """A network whose weights have shapes and take no memory."""
        with torch.device("meta"):
            return cls(config)

    def materialise(self) -> None:
        """Give weights without memory some, to be written to; not for static features."""
        self.to_empty(device="cpu")
        self.features = WindowFeatures(self.config.window)

    @property
    def transformer_layers(self) -> List[TransformerLayer]:
        return [layer for layer in self.layers if isinstance(layer, TransformerLayer)]

    def mixtures(self) -> Dict[str, Mixture]:
        return {
            f"layers.{i}.router": Mixture(layer.router, [layer.experts])
            for i, layer in enumerate(self.transformer_layers)
        }

    @property
    def shortest_training_context(self) -> int:
        """A few patches: every patch is told from those before it, so that all windows teach."""
        return min(_ENOUGH_PATCHES * max(self.patch_sizes), self.window.context_length)

    def draws_paths(self, patch_size: int) -> bool:
        """Whether a forecast takes more than one patch, of which each depends on the last."""
        return self.config.num_future_patches(patch_size) > 1

    def outputs(
        self, inputs: Mapping[str, Tensor], patch_size: Optional[int] = None
    ) -> NetworkOutput:
        """The distribution of what follows the context, if it ends within one patch."""
        patch_size = patch_size or self.patch_sizes[0]
        variates = self.variates(inputs, patch_size)
        hidden, routings, _ = self.encode(variates, inputs, patch_size, last=1)
        distr_args = self.parameters_after(hidden, patch_size)
        future = slice(self.window.lead_time, self.window.future_length)
        return NetworkOutput(
            tuple(argument[:, future] for argument in distr_args),
            variates.loc,
            variates.scale,
            routings,
        )

    def sample_paths(
        self, inputs: Mapping[str, Tensor], patch_size: int, num_samples: int
    ) -> Tuple[Tensor, Dict[str, Routing]]:
        """Paths ``[sample, batch, horizon, channel]``; see :mod:`.decoding`."""
        from .decoding import PathSampler

        paths, routings = PathSampler(self, inputs, patch_size).sample(num_samples)
        return paths[:, :, self.window.lead_time :], routings

    def window_losses(
        self, batch: Mapping[str, Tensor], patch_size: int
    ) -> Tuple[Tensor, Dict[str, Routing]]:
        """Loss of every patch given those before it ``[batch]``.

        In training, a first part of each window of random length serves for its location and
        scale alone, and the loss is that of the rest (section 3.2.1 of the paper, where that part
        is fixed). Otherwise it is that of the horizon. Short windows share rows, see
        :mod:`.packing`.
        """
        context = self.whole_context(batch, patch_size)
        past = context[0].shape[1] // patch_size
        future = self.config.num_future_patches(patch_size)
        target, observed = (
            torch.cat([before, _pad_to(batch[name], future * patch_size)], dim=1)
            for before, name in zip(context, ("future_target", "future_observed_values"))
        )
        present = _present(context[1], patch_size)
        first = present.int().argmax(dim=1)
        prefix = torch.full_like(first, past)
        if self.training:
            share = torch.empty(len(first), device=first.device).uniform_(_SMALLEST_PREFIX, 1.0)
            prefix = first + ((past - first) * share).ceil().long().clamp_min(1)
        patch_of_step = torch.arange(target.shape[1], device=target.device) // patch_size
        before = (patch_of_step < prefix.unsqueeze(1)).unsqueeze(-1)
        variates = self.variates_of(batch, patch_size, target, observed, observed * before, future)
        hidden, routings, _ = self.encode(variates.without_last(), batch, patch_size)
        distr_args = self.parameters_after(hidden, patch_size)
        told = observed * ~before
        if not self.training:
            told[:, past * patch_size : past * patch_size + self.window.lead_time] = 0.0
        losses = window_loss(
            self.distr_output,
            target[:, patch_size:],
            told[:, patch_size:],
            distr_args,
            variates.loc,
            variates.scale,
        )
        return losses, routings

    def variates(self, inputs: Mapping[str, Tensor], patch_size: int) -> Variates:
        """Context and known future covariates, standardised by what is observed of each."""
        target, observed = self.whole_context(inputs, patch_size)
        return self.variates_of(inputs, patch_size, target, observed, observed, 0)

    def whole_context(self, inputs: Mapping[str, Tensor], patch_size: int) -> Tuple[Tensor, Tensor]:
        """Past target and what is observed of it, whole patches; before it, its first value."""
        target, observed = inputs["past_target"], inputs["past_observed_values"]
        missing = -target.shape[1] % patch_size
        if missing:
            target = torch.cat([target[:, :1].expand(-1, missing, -1), target], dim=1)
            observed = F.pad(observed, (0, 0, missing, 0))
        return target, observed

    def variates_of(
        self,
        inputs: Mapping[str, Tensor],
        patch_size: int,
        target_BTC: Tensor,
        observed_BTC: Tensor,
        scaled_by_BTC: Tensor,
        future: int,
    ) -> Variates:
        """Target and covariates over context and ``future`` patches beyond."""
        steps = target_BTC.shape[1]
        _, loc, scale = self.scaler(target_BTC, scaled_by_BTC)
        scaled = [(target_BTC - loc) / scale]
        if FEAT_DYNAMIC_REAL in inputs:
            scaled.append(self.known_covariates(inputs, patch_size)[:, :steps])
        if PAST_FEAT_DYNAMIC_REAL in inputs:
            past_only = self._scaled_covariates(inputs[PAST_FEAT_DYNAMIC_REAL], patch_size)
            scaled.append(_pad_to(past_only, steps))
        patches = torch.cat(scaled, dim=-1).unflatten(1, (-1, patch_size)).transpose(-1, -2)
        past = steps // patch_size - future
        present = _present(observed_BTC[:, : past * patch_size], patch_size)
        if present.all():
            return Variates(patches, None, loc, scale)
        return Variates(patches, F.pad(present, (0, future), value=True), loc, scale)

    def known_covariates(self, inputs: Mapping[str, Tensor], patch_size: int) -> Tensor:
        """Standardised covariates known in advance ``[B, T, C]``, in whole patches.

        With ``covariates_ahead`` each is moved back by a patch, so that the token that tells the
        next patch has read that patch's covariates.
        """
        scaled = self._scaled_covariates(inputs[FEAT_DYNAMIC_REAL], patch_size)
        if not self.config.covariates_ahead:
            return scaled
        return _pad_to(scaled[:, patch_size:], scaled.shape[1])

    def _scaled_covariates(self, covariates_BTC: Tensor, patch_size: int) -> Tensor:
        """Covariates, each standardised by all that is known of it, in whole patches."""
        known = covariates_BTC.isfinite()
        values = covariates_BTC.nan_to_num(nan=0.0)
        loc, scale = _COVARIATE_SCALER.moments(values, known.to(values.dtype))
        scaled = torch.where(known, (values - loc) / scale, 0.0)
        before = -self.window.context_length % patch_size
        scaled = F.pad(scaled, (0, 0, before, 0))
        return _pad_to(scaled, -(-scaled.shape[1] // patch_size) * patch_size)

    def embed(self, patches: Tensor, inputs: Mapping[str, Tensor], patch_size: int) -> Tensor:
        """Features ``[B, …, D]`` of patches ``[B, …, P]``."""
        size = self.config.trained_patch_sizes.index(patch_size)
        hidden = self.feature_projection(F.silu(self.value_projection(patches, size)), size)
        embedded = hidden + self.residual_projection(patches, size)
        if self.static_projection is not None:
            static = self.static_projection(self.features.static(inputs))
            embedded = embedded + static.unflatten(0, (-1, *[1] * (embedded.dim() - 2)))
        return embedded

    def encode(
        self,
        variates: Variates,
        inputs: Mapping[str, Tensor],
        patch_size: int,
        last: Optional[int] = None,
        keep: bool = False,
    ) -> Tuple[Tensor, Dict[str, Routing], List[KeysAndValues]]:
        """Features of the target's tokens, the routers' decisions, and keys and values.

        Where all patches are wanted and nothing is kept, windows are packed if that pays.

        Parameters
        ----------
        last
            Number of patches at the end whose features are wanted; ``None`` for all.
        keep
            Whether to keep keys and values.

        Returns
        -------
        hidden, routings, caches
            ``[B, L, C, D]``, C of the target only, of no meaning for padding; a routing and, if
            kept, a pair of keys and values for each layer.
        """
        embedded = self.embed(variates.patches, inputs, patch_size)
        packing = find_packing(variates.present) if last is None and not keep else None
        if packing is None:
            slots = Slots.of_windows(embedded.shape[1], variates.present, embedded.device)
        else:
            embedded, slots = packing.pack(embedded), packing.slots
        num_variates = embedded.shape[2]
        x_BSD, tokens = embedded.flatten(1, 2), slots.of_tokens(num_variates)
        rotation = self.rotation(tokens.position)
        seen = self._seen(tokens, inputs, patch_size, num_variates)
        visibility = _visibility(tokens, seen, num_variates)
        routings, caches = {}, []
        for i, layer in enumerate(self.transformer_layers):
            wanted = None if last is None or i < len(self.layers) - 1 else last * num_variates
            visible = visibility if wanted is None else _of_last(visibility, wanted)
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                x_BSD, routing, cache = checkpoint(
                    layer, x_BSD, rotation, visible, wanted, use_reentrant=False
                )
            else:
                x_BSD, routing, cache = layer(x_BSD, rotation, visible, wanted)
            if seen is not None:
                counted = seen if wanted is None else seen[:, -wanted:]
                routing = routing._replace(counted_T=counted.expand(x_BSD.shape[:2]))
            routings[f"layers.{i}.router"] = routing
            if keep:
                caches.append(cache)
        hidden = self.norm(x_BSD).unflatten(1, (-1, num_variates))
        hidden = hidden[:, :, : self.window.target_dim]
        return hidden if packing is None else packing.unpack(hidden), routings, caches

    def rotation(self, positions: Tensor) -> Rotation:
        """By which tokens at these positions ``[…, S]`` are turned, ``[…, S, 1, H / 4]``."""
        head_features = self.config.d_model // self.config.num_heads
        return Rotation.of_positions(positions.unsqueeze(-1), head_features)

    def _seen(
        self, tokens: Slots, inputs: Mapping[str, Tensor], patch_size: int, num_variates: int
    ) -> Optional[Tensor]:
        """Which tokens are neither padding nor unknown ``[R or 1, S]``; ``None`` if all are."""
        if PAST_FEAT_DYNAMIC_REAL not in inputs:
            return tokens.present
        # Covariates known in the past have no tokens in the future.
        num_known = num_variates - inputs[PAST_FEAT_DYNAMIC_REAL].shape[-1]
        variate = torch.arange(tokens.position.shape[1], device=tokens.position.device)
        variate = variate % num_variates
        context = self.config.num_context_patches(patch_size)
        known = (variate < num_known) | (tokens.position < context)
        return known if tokens.present is None else known & tokens.present

    def parameters_after(self, hidden: Tensor, patch_size: int) -> Tuple[Tensor, ...]:
        """The head's parameters of the patches after these tokens.

        Parameters
        ----------
        hidden
            ``[B, L, C, D]``.

        Returns
        -------
        tuple of Tensor
            Each ``[B, L * P, C]``, or with one more dimension.
        """
        size = self.config.trained_patch_sizes.index(patch_size)
        raw = self.parameter_projection(hidden, size)
        raw_KBLPC = raw.unflatten(-1, (self.parameter_head.in_features, -1)).permute(3, 0, 1, 4, 2)
        raw_BTCK = raw_KBLPC[:, :, :, :patch_size].flatten(2, 3).movedim(0, -1)
        return self.parameter_head(raw_BTCK)


_COVARIATE_SCALER = WindowScaler("regularised_std")


def _pad_to(x: Tensor, steps: int) -> Tensor:
    """``[B, T, C]`` with zeros behind."""
    return F.pad(x, (0, 0, 0, steps - x.shape[1]))


def _present(observed_BTC: Tensor, patch_size: int) -> Tensor:
    """From the first patch on that has an observed value, and at least the last ``[B, L]``."""
    seen = observed_BTC.any(dim=-1).unflatten(1, (-1, patch_size)).any(dim=-1)
    seen[:, -1] = True
    return seen.cummax(dim=1).values


def _visibility(tokens: Slots, seen: Optional[Tensor], num_variates: int) -> Visibility:
    """Tokens see those of their window, of their own time and before, but no padding."""
    if seen is None and num_variates == 1:
        return Visibility(None, None)
    allowed = tokens.position.unsqueeze(1) <= tokens.position.unsqueeze(2)
    if tokens.window is not None:
        allowed = allowed & (tokens.window.unsqueeze(1) == tokens.window.unsqueeze(2))
    if seen is not None:
        allowed = allowed & seen.unsqueeze(1)
    num_tokens, device = allowed.shape[-1], allowed.device
    allowed = allowed | torch.eye(num_tokens, dtype=torch.bool, device=device)
    variate = torch.arange(num_tokens, device=device) % num_variates
    same = variate == variate.unsqueeze(1) if num_variates > 1 else None
    return Visibility(allowed.unsqueeze(1), same)


def _of_last(visibility: Visibility, queries: int) -> Visibility:
    allowed, same = visibility
    return Visibility(
        None if allowed is None else allowed[:, :, -queries:],
        None if same is None else same[-queries:],
    )
