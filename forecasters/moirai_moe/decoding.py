"""How paths of several patches are drawn, each patch given those before it.

``"cached"``
    Location and scale are those of the context. Keys and values of the context are computed once
    for each series, and every further patch is one step of its samples' new tokens.
``"reencode"``
    As uni2ts does: a drawn patch counts as observed, so that location and scale drift with every
    patch, and all tokens of every sample are computed anew. The work grows with the samples times
    the context; up to the first patch both are the same.

Shape suffixes as in :mod:`.network`, with M samples.
"""

from typing import Dict, List, Mapping

import torch
from torch import Tensor

from ..fields import FEAT_DYNAMIC_REAL
from .layers import KeysAndValues, Visibility
from .network import MoiraiMoENetwork

# Tokens computed at once, which bounds the memory whatever the number of samples.
_TOKENS_AT_ONCE = 16_384


class PathSampler:
    """Draws paths of a batch of series.

    Parameters
    ----------
    network
        The network.
    inputs
        As its ``describe_inputs`` lists them.
    patch_size
        One of its patch sizes.
    """

    def __init__(
        self, network: MoiraiMoENetwork, inputs: Mapping[str, Tensor], patch_size: int
    ) -> None:
        self.network = network
        self.inputs = inputs
        self.patch_size = patch_size
        self.num_future = network.config.num_future_patches(patch_size)
        self.context = network.variates(inputs, patch_size)
        hidden, self.routings, self._caches = network.encode(
            self.context, inputs, patch_size, last=1
        )
        self._first_parameters = network.parameters_after(hidden, patch_size)

    def sample(self, num_samples: int) -> Tensor:
        """Paths ``[M, B, T, C]`` over lead time and horizon."""
        decode = {"cached": self._cached, "reencode": self._reencoded}[self.network.config.decoding]
        batch, past, variates, _ = self.context.patches.shape
        steps = 1 if self.network.config.decoding == "cached" else past + self.num_future
        at_once = max(1, _TOKENS_AT_ONCE // (batch * steps * variates))
        sizes = [min(at_once, num_samples - done) for done in range(0, num_samples, at_once)]
        paths = torch.cat([decode(size) for size in sizes])
        return paths[:, :, : self.network.window.future_length]

    def _draw_first(self, num_samples: int) -> Tensor:
        """The patch after the context ``[M, B, P, C]``."""
        head = self.network.distr_output
        distribution = head.distribution(
            self._first_parameters, self.context.loc, self.context.scale
        )
        return distribution.sample(torch.Size((num_samples,)))

    def _cached(self, num_samples: int) -> Tensor:
        network, patch_size = self.network, self.patch_size
        loc, scale = self.context.loc, self.context.scale
        known = self._known_covariates()
        batch, past = self.context.patches.shape[:2]
        num_variates = loc.shape[-1] + known.shape[2]
        visibility = self._visibility_of_step(num_variates)
        generated: List[List[KeysAndValues]] = [[] for _ in network.transformer_layers]
        drawn = [self._draw_first(num_samples)]
        for step in range(self.num_future - 1):
            target = ((drawn[-1] - loc) / scale).permute(1, 0, 3, 2)
            covariates = known[:, step].unsqueeze(1).expand(-1, num_samples, -1, -1)
            patches = torch.cat([target, covariates], dim=2)
            x_BMVD = network.embed(patches, self.inputs, patch_size)
            rotation = network.rotation(past + step, 1, num_variates, x_BMVD.device)
            for layer, cache, since in zip(network.transformer_layers, self._caches, generated):
                x_BMVD = layer.step(x_BMVD, rotation, cache, visibility, since)
            hidden = network.norm(x_BMVD[:, :, : loc.shape[-1]])
            distr_args = network.parameters_after(hidden.flatten(0, 1).unsqueeze(1), patch_size)
            rows = [t.repeat_interleave(num_samples, dim=0) for t in (loc, scale)]
            values = network.distr_output.distribution(distr_args, *rows).sample()
            drawn.append(values.unflatten(0, (batch, num_samples)).transpose(0, 1))
        return torch.cat(drawn, dim=2)

    def _known_covariates(self) -> Tensor:
        """Known covariates of the patches to forecast ``[B, L, C, P]``."""
        patches = self.context.patches
        if FEAT_DYNAMIC_REAL not in self.inputs:
            return patches.new_zeros(len(patches), self.num_future, 0, self.patch_size)
        scaled = self.network.known_covariates(self.inputs, self.patch_size)
        future = scaled[:, patches.shape[1] * self.patch_size :]
        return future.unflatten(1, (-1, self.patch_size)).transpose(-1, -2)

    def _visibility_of_step(self, num_variates: int) -> Visibility:
        _, past, all_variates, _ = self.context.patches.shape
        present = self.context.present
        allowed = None
        if not present.all():
            allowed = present.repeat_interleave(all_variates, dim=1)[:, None, None]
        if all_variates == 1:
            return Visibility(allowed, None)
        variate = torch.arange(all_variates, device=present.device)
        return Visibility(allowed, variate[:num_variates].unsqueeze(1) == variate.repeat(past))

    def _reencoded(self, num_samples: int) -> Tensor:
        network, patch_size = self.network, self.patch_size
        target, observed = network.whole_context(self.inputs, patch_size)
        inputs, target, observed = (
            _repeat(self.inputs, num_samples),
            target.repeat(num_samples, 1, 1),
            observed.repeat(num_samples, 1, 1),
        )
        drawn = [self._draw_first(num_samples).flatten(0, 1)]
        for step in range(1, self.num_future):
            target = torch.cat([target, drawn[-1]], dim=1)
            observed = torch.cat([observed, torch.ones_like(drawn[-1])], dim=1)
            variates = network.variates_of(inputs, patch_size, target, observed, observed, step)
            hidden, _, _ = network.encode(variates, inputs, patch_size, last=1)
            distr_args = network.parameters_after(hidden, patch_size)
            head = network.distr_output
            drawn.append(head.distribution(distr_args, variates.loc, variates.scale).sample())
        return torch.cat(drawn, dim=1).unflatten(0, (num_samples, -1))


def _repeat(inputs: Mapping[str, Tensor], times: int) -> Dict[str, Tensor]:
    return {
        name: tensor.repeat(times, *[1] * (tensor.dim() - 1)) for name, tensor in inputs.items()
    }
