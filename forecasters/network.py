"""What every model's network shares: its inputs, its head, its loss."""

import dataclasses
from functools import cached_property
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from gluonts.core.component import equals
from gluonts.model import Input, InputSpec
from gluonts.torch.distributions import Output
from torch import Tensor, nn

from ..backends import Backend, TorchBackend
from ..distributions import ParameterHead, scaling_for, window_loss
from .features import WindowFeatures
from .fields import (
    FEAT_DYNAMIC_REAL,
    FEAT_STATIC_CAT,
    FEAT_STATIC_REAL,
    PAST_FEAT_DYNAMIC_REAL,
    WindowConfig,
)
from .frequencies import time_features
from .moe import GatedExperts, LinearExperts, ResidualMLPExperts, Router, Routing
from .scaling import SCALINGS, WindowScaler


class NetworkOutput(NamedTuple):
    """What a network says of a batch of windows.

    Attributes
    ----------
    distr_args
        The head's parameters, each ``[batch, horizon, channel]`` or with one more dimension.
    loc, scale
        Location and scale of the windows, ``[batch, 1, channel]``.
    routings
        Every router's decision, by its name in the network.
    """

    distr_args: Tuple[Tensor, ...]
    loc: Tensor
    scale: Tensor
    routings: Dict[str, Routing]


class Mixture(NamedTuple):
    """A router, and all the banks of experts that it weights."""

    router: Router
    banks: Sequence[Union[GatedExperts, LinearExperts, ResidualMLPExperts]]


class ForecastNetwork(nn.Module):
    """Base of the networks: a subclass says how inputs become a :class:`NetworkOutput`.

    A network trains with torch; a predictor tells it what to forecast with.

    Parameters
    ----------
    config
        The model's settings.
    reads_time_features
        Whether the network reads ``time_feat``.
    forecasts_lead_time
        Whether lead time is forecast like the horizon, and its inputs are cut so.
    """

    def __init__(
        self, config: Any, reads_time_features: bool = False, forecasts_lead_time: bool = False
    ) -> None:
        super().__init__()
        self.config: Any = config
        self.backend: Backend = TorchBackend()
        self.kept_experts: Dict[str, List[int]] = {}
        self.reads_time_features = reads_time_features
        self.forecasts_lead_time = forecasts_lead_time
        self.scaler = WindowScaler(config.scaling)
        self.features = WindowFeatures(config.window)
        self.parameter_head = ParameterHead(config.distr_output)

    def __getnewargs_ex__(self) -> Tuple[Tuple[()], Dict[str, Any]]:
        return (), {"config": self.config}

    def mixtures(self) -> Dict[str, Mixture]:
        """Every router and its experts, by their names in ``NetworkOutput.routings``."""
        raise NotImplementedError

    def keep_experts(self, kept: Mapping[str, Sequence[int]]) -> None:
        """Drop experts.

        Parameters
        ----------
        kept
            The experts that stay, by router, numbered as the network was made; of routers not
            named all stay. ``kept_experts`` remembers them.

        Raises
        ------
        ValueError
            If there is no such router, or it has no such expert.
        """
        mixtures = self.mixtures()
        for name, ids in kept.items():
            if name not in mixtures:
                raise ValueError(f"kept_experts names {name!r}, but the routers are {[*mixtures]}")
            router, banks = mixtures[name]
            there = self.kept_experts.get(name, list(range(router.num_experts)))
            absent = sorted(set(ids) - set(there))
            if absent or not ids:
                raise ValueError(f"kept_experts[{name!r}]={list(ids)} must be some of {there}")
            chosen = [there.index(expert) for expert in sorted(set(ids))]
            for part in (router, *banks):
                part.keep(chosen)
            self.kept_experts[name] = sorted(set(ids))

    def use_backend(self, backend: Backend) -> None:
        """Compute routers and experts with this backend from now on."""
        for module in self.modules():
            if hasattr(module, "backend"):
                setattr(module, "backend", backend)  # noqa: B010, typed as any attribute

    @property
    def window(self) -> WindowConfig:
        return self.config.window

    @property
    def distr_output(self) -> Output:
        return self.config.distr_output

    @property
    def patch_sizes(self) -> Tuple[int, ...]:
        return self.config.patch_sizes

    @property
    def input_window(self) -> WindowConfig:
        """What is cut from a series for this network."""
        window = self.window
        if not self.forecasts_lead_time:
            return window
        return dataclasses.replace(window, prediction_length=window.future_length, lead_time=0)

    @property
    def shortest_training_context(self) -> int:
        """Steps of context that training windows need at least, of series too short for all."""
        return self.window.context_length

    def draws_paths(self, patch_size: int) -> bool:
        """Whether a forecast is a set of paths, instead of a distribution of each step."""
        return False

    def sample_paths(
        self, inputs: Mapping[str, Tensor], patch_size: int, num_samples: int
    ) -> Tuple[Tensor, Dict[str, Routing]]:
        """Paths ``[sample, batch, horizon, channel]``, and the routers' decisions."""
        raise NotImplementedError

    @cached_property
    def input_names(self) -> Tuple[str, ...]:
        return tuple(self.describe_inputs())

    def describe_inputs(self, batch_size: int = 1) -> InputSpec:
        """Names, shapes and types of the inputs, in the order :meth:`forward` takes them."""
        window = self.input_window
        context, channels = window.context_length, window.target_dim
        both = context + window.prediction_length
        shapes: Dict[str, Tuple[int, ...]] = {
            "past_target": (batch_size, context, channels),
            "past_observed_values": (batch_size, context, channels),
        }
        if window.num_feat_dynamic_real:
            shapes[FEAT_DYNAMIC_REAL] = (batch_size, both, window.num_feat_dynamic_real)
        if window.num_past_feat_dynamic_real:
            shapes[PAST_FEAT_DYNAMIC_REAL] = (
                batch_size,
                context,
                window.num_past_feat_dynamic_real,
            )
        if window.num_feat_static_real:
            shapes[FEAT_STATIC_REAL] = (batch_size, window.num_feat_static_real)
        if window.cardinality:
            shapes[FEAT_STATIC_CAT] = (batch_size, len(window.cardinality))
        if self.reads_time_features:
            shapes["time_feat"] = (batch_size, both, len(time_features(window.freq)))
        return InputSpec(
            {
                name: Input(shape, torch.long if name == FEAT_STATIC_CAT else torch.float)
                for name, shape in shapes.items()
            },
            torch.zeros,
        )

    def outputs(
        self, inputs: Mapping[str, Tensor], patch_size: Optional[int] = None
    ) -> NetworkOutput:
        """Parameters of the forecast distributions, and the routers' decisions.

        Parameters
        ----------
        inputs
            As :meth:`describe_inputs` lists them.
        patch_size
            One of ``patch_sizes``; the first by default.
        """
        raise NotImplementedError

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tuple[Tuple[Tensor, ...], Tensor, Tensor]:
        """Head parameters, location and scale, as GluonTS's forecast generators take them."""
        inputs = {**dict(zip(self.input_names, args)), **kwargs}
        output = self.outputs(inputs)
        return output.distr_args, output.loc, output.scale

    def window_losses(
        self, batch: Mapping[str, Tensor], patch_size: int
    ) -> Tuple[Tensor, Dict[str, Routing]]:
        """The loss of each window ``[batch]``, and the routers' decisions.

        Parameters
        ----------
        batch
            The inputs, and ``future_target`` and ``future_observed_values`` ``[batch, horizon,
            channel]``; before the horizon lies the lead time where it is forecast, too.
        """
        output = self.outputs(batch, patch_size)
        target, observed = (
            batch[name][:, -self.window.prediction_length :]
            for name in ("future_target", "future_observed_values")
        )
        return self.loss(output, target, observed), output.routings

    def loss(
        self, output: NetworkOutput, future_target: Tensor, future_observed_values: Tensor
    ) -> Tensor:
        """The head's loss per window ``[batch]``, see :func:`moecast.distributions.window_loss`.

        Parameters
        ----------
        future_target, future_observed_values
            ``[batch, horizon, channel]``.
        """
        return window_loss(
            self.distr_output,
            future_target,
            future_observed_values,
            output.distr_args,
            output.loc,
            output.scale,
        )


def resolve_scaling(scaling: Optional[str], distr_output: Output) -> str:
    """The window scaling to use with a head.

    Parameters
    ----------
    scaling
        ``"auto"`` for what the head's support allows, a name, or ``None`` for no scaling.

    Raises
    ------
    ValueError
        If the name is unknown, or shifts the values of a head that cannot be shifted.
    """
    allowed = scaling_for(distr_output)
    if scaling == "auto":
        return allowed
    name = WindowScaler(scaling or "none").scaling
    if allowed != "std" and SCALINGS.index(name) < SCALINGS.index(allowed):
        raise ValueError(
            f"scaling={name!r} takes values out of the support of {type(distr_output).__name__}: "
            f"use scaling={allowed!r} or 'auto'"
        )
    return name


@equals.register(ForecastNetwork)
def _equal_networks(this: ForecastNetwork, that: Any) -> bool:
    """Networks are equal if their settings and their weights are."""
    if type(this) is not type(that) or not equals(this.config, that.config):
        return False
    ours, theirs = this.state_dict(), that.state_dict()
    return all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours)
