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

from typing import Any, Callable, Dict, Hashable, List, Mapping, NamedTuple, Optional, Tuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..fields import FEAT_DYNAMIC_REAL
from ..moe import Routing
from .layers import KeysAndValues, Visibility
from .network import MoiraiMoENetwork, Variates

# Tokens computed at once, which bounds the memory whatever the number of samples. A processor is
# fastest where they fit its caches, and memory is not asked of the system again and again.
_TOKENS_AT_ONCE, _TOKENS_AT_ONCE_ON_CUDA = 4_096, 16_384

Paths = Tuple[Tensor, Dict[str, Routing]]


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
    context
        The inputs' context, if it is known already.
    """

    def __init__(
        self,
        network: MoiraiMoENetwork,
        inputs: Mapping[str, Tensor],
        patch_size: int,
        context: Optional[Variates] = None,
    ) -> None:
        self.network = network
        self.inputs = inputs
        self.patch_size = patch_size
        self.num_future = network.config.num_future_patches(patch_size)
        self.context = context or network.variates(inputs, patch_size)

    def sample(self, num_samples: int) -> Paths:
        """Paths ``[M, B, T, C]`` over lead time and horizon, and the context's routings."""
        cached = self.network.config.decoding == "cached"
        if cached and self.context.patches.is_cuda and not torch.is_grad_enabled():
            return _replayed(self, num_samples)
        return self._sample(num_samples)

    def _sample(self, num_samples: int) -> Paths:
        hidden, routings, caches = self.network.encode(
            self.context, self.inputs, self.patch_size, last=1, keep=True
        )
        first = self.network.parameters_after(hidden, self.patch_size)
        batch, past, variates, _ = self.context.patches.shape
        cached = self.network.config.decoding == "cached"
        steps = 1 if cached else past + self.num_future
        most = _TOKENS_AT_ONCE_ON_CUDA if self.context.patches.is_cuda else _TOKENS_AT_ONCE
        at_once = max(1, most // (batch * steps * variates))
        sizes = [min(at_once, num_samples - done) for done in range(0, num_samples, at_once)]
        paths = torch.cat(
            [
                self._cached(first, caches, size) if cached else self._reencoded(first, size)
                for size in sizes
            ]
        )
        return paths[:, :, : self.network.window.future_length], routings

    def _draw_first(self, distr_args: Tuple[Tensor, ...], num_samples: int) -> Tensor:
        """The patch after the context ``[M, B, P, C]``."""
        head, (_, _, loc, scale) = self.network.distr_output, self.context
        return head.distribution(distr_args, loc, scale).sample(torch.Size((num_samples,)))

    def _cached(
        self, first: Tuple[Tensor, ...], caches: List[KeysAndValues], num_samples: int
    ) -> Tensor:
        network, patch_size = self.network, self.patch_size
        loc, scale = self.context.loc, self.context.scale
        known = self._known_covariates()
        batch, past = self.context.patches.shape[:2]
        num_variates = loc.shape[-1] + known.shape[2]
        visibility = self._visibility_of_step(num_variates)
        config = network.config
        heads, features = config.num_heads, config.d_model // config.num_heads
        num_tokens = (self.num_future - 1) * num_variates
        generated = [
            loc.new_empty(2, batch, num_samples, heads, num_tokens, features)
            for _ in network.transformer_layers
        ]
        drawn = [self._draw_first(first, num_samples)]
        for step in range(self.num_future - 1):
            target = ((drawn[-1] - loc) / scale).permute(1, 0, 3, 2)
            covariates = known[:, step].unsqueeze(1).expand(-1, num_samples, -1, -1)
            patches = torch.cat([target, covariates], dim=2)
            x_BMVD = network.embed(patches, self.inputs, patch_size)
            positions = torch.full((num_variates,), past + step, device=x_BMVD.device)
            rotation = network.rotation(positions)
            for layer, cache, since in zip(network.transformer_layers, caches, generated):
                keys, values = since[..., : (step + 1) * num_variates, :]
                x_BMVD = layer.step(x_BMVD, rotation, cache, visibility, (keys, values))
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
        present, device = self.context.present, self.context.patches.device
        allowed = None
        if present is not None:
            allowed = present.repeat_interleave(all_variates, dim=1)[:, None, None]
        if all_variates == 1:
            return Visibility(allowed, None)
        variate = torch.arange(all_variates, device=device)
        return Visibility(allowed, variate[:num_variates].unsqueeze(1) == variate.repeat(past))

    def _reencoded(self, first: Tuple[Tensor, ...], num_samples: int) -> Tensor:
        network, patch_size = self.network, self.patch_size
        target, observed = network.whole_context(self.inputs, patch_size)
        inputs, target, observed = (
            _repeat(self.inputs, num_samples),
            target.repeat(num_samples, 1, 1),
            observed.repeat(num_samples, 1, 1),
        )
        drawn = [self._draw_first(first, num_samples).flatten(0, 1)]
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


class _Graph(NamedTuple):
    """A recorded CUDA graph, with the tensors that it reads and writes."""

    inputs: Dict[str, Tensor]
    replay: Callable[[], None]
    outputs: Paths


# Per network, the graphs of the shapes that were seen; None where one was seen once.
_GRAPHS: "WeakKeyDictionary[MoiraiMoENetwork, Dict[Hashable, Optional[_Graph]]]"
_GRAPHS = WeakKeyDictionary()
_MOST_GRAPHS = 8


def _replayed(sampler: PathSampler, num_samples: int) -> Paths:
    """Draws paths by a CUDA graph, from the second batch of a shape on.

    A step of the decoding is a hundred small kernels, which take longer to launch than to run.
    """
    network = sampler.network
    tensors = {
        **{name: tensor for name, tensor in sampler.inputs.items() if not name.startswith("past_")},
        **{f"context.{name}": tensor for name, tensor in sampler.context._asdict().items()},
    }
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    shapes = tuple((name, *tensor.shape) for name, tensor in tensors.items())
    # Weights that were moved lie elsewhere than a graph reads them.
    weights = tuple(parameter.data_ptr() for parameter in network.parameters())
    key = sampler.patch_size, num_samples, shapes, weights
    graphs = _GRAPHS.setdefault(network, {})
    if key not in graphs:
        if len(graphs) == _MOST_GRAPHS:
            graphs.pop(next(iter(graphs)))
        graphs[key] = None
        return sampler._sample(num_samples)
    recorded = graphs[key]
    if recorded is None:
        recorded = graphs[key] = _record(sampler, tensors, num_samples)
    for name, tensor in tensors.items():
        recorded.inputs[name].copy_(tensor)
    recorded.replay()
    paths, routings = recorded.outputs
    return paths.clone(), routings


def _record(sampler: PathSampler, tensors: Dict[str, Tensor], num_samples: int) -> _Graph:
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    context: Dict[str, Any] = {name: own.get(f"context.{name}") for name in sampler.context._fields}
    # What is past the graph has in its context; the names still say which covariates there are.
    inputs = {name: own.get(name, tensor) for name, tensor in sampler.inputs.items()}
    recorder = PathSampler(sampler.network, inputs, sampler.patch_size, Variates(**context))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = recorder._sample(num_samples)
    return _Graph(own, graph.replay, outputs)
