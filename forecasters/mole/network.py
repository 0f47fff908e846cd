"""MoLE's network (Ni et al. 2024, arXiv 2312.06786), probabilistic and with patches.

Shape suffixes: B series, C channels, L context, H horizon, P patch length (the phase within a
patch), N patches of the context, M patches of the horizon, E experts, K raw head parameters.
"""

from typing import Dict, List, Mapping, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...backends import Backend, LinearMixture
from ..fields import FEAT_DYNAMIC_REAL, PAST_FEAT_DYNAMIC_REAL
from ..frequencies import time_features
from ..moe import LinearExperts, MLPRouter, ResidualMLPExperts, Routing
from ..network import ForecastNetwork, Mixture, NetworkOutput
from ..patching import fold
from .config import MoLEConfig
from .folding import MatrixBuilder, fold_experts, fold_router


class PatchedExperts(nn.Module):
    """Linear experts of one patch size, from scaled lookback to raw head parameters.

    The lookback is folded into patches; experts act across patches, with weights shared along
    the patch. With patches of one step they are the plain linear models.

    Parameters
    ----------
    config
        The network's settings.
    patch_size
        P.
    num_parameters
        Raw head parameters per step and channel, K.
    backend
        Computes the experts.
    """

    def __init__(
        self, config: MoLEConfig, patch_size: int, num_parameters: int, backend: Backend
    ) -> None:
        super().__init__()
        window = config.window
        self.patch_size = patch_size
        self.context_length = window.context_length
        self.prediction_length = window.prediction_length
        self.individual = config.individual
        self.num_parameters = num_parameters
        context_patches = -(-window.context_length // patch_size)
        horizon_patches = -(-window.prediction_length // patch_size)
        components = 2 if config.expert == "dlinear" else 1
        covariates = window.num_feat_dynamic_real + window.num_past_feat_dynamic_real
        in_features = context_patches * (components + covariates)
        num_channels = window.target_dim if config.individual else None
        self.residual: Optional[ResidualMLPExperts] = None
        if config.expert == "rmlp":
            self.residual = ResidualMLPExperts(
                config.num_experts,
                in_features,
                config.hidden_dimension,
                config.dropout,
                num_channels,
                backend,
            )
        self.linear = LinearExperts(
            config.num_experts, in_features, horizon_patches * num_parameters, num_channels, backend
        )

    def folded(
        self, trend_matrix: Optional[Tensor], affine: Optional[Tuple[Tensor, Tensor]]
    ) -> LinearMixture:
        """The experts as matrices; see :func:`.folding.fold_experts`."""
        build = MatrixBuilder(
            self.patch_size, self.context_length, self.prediction_length, self.individual
        )
        residual = None
        if self.residual is not None:
            expand, contract = self.residual.expand, self.residual.contract
            residual = expand.weight, expand.bias, contract.weight, contract.bias
        linear = self.linear.weight, self.linear.bias
        return fold_experts(build, linear, residual, trend_matrix, affine)

    def forward(self, components_BCL: List[Tensor], weights_BCE: Tensor) -> Tensor:
        """Mixed raw parameters ``[B, H, C, K]`` of the components of each channel's lookback."""
        folded = [fold(component, self.patch_size) for component in components_BCL]
        x_BCPI = torch.cat(folded, dim=-1)
        batch, channels, phases, features = x_BCPI.shape
        weights_BCPE = weights_BCE.unsqueeze(2).expand(-1, -1, phases, -1)
        if self.individual:
            x = x_BCPI.transpose(0, 1).reshape(channels, batch * phases, features)
            weights = weights_BCPE.transpose(0, 1).reshape(channels, batch * phases, -1)
        else:
            x = x_BCPI.reshape(batch * channels * phases, features)
            weights = weights_BCPE.reshape(batch * channels * phases, -1)
        mixed = self.linear.mix(x if self.residual is None else self.residual(x), weights)
        if self.individual:
            mixed = mixed.unflatten(1, (batch, phases)).transpose(0, 1)
        # The steps of one parameter lie side by side, so that the head's maths is vectorised.
        raw_BCPKM = mixed.reshape(batch, channels, phases, self.num_parameters, -1)
        raw_KBMPC = raw_BCPKM.permute(3, 0, 4, 2, 1)
        return raw_KBMPC.flatten(2, 3)[:, :, : self.prediction_length].movedim(0, -1)


class MoLENetwork(ForecastNetwork):
    """A mixture of linear experts under a router.

    The experts' raw outputs are mixed, then mapped to the domain of the head's parameters, then
    scaled back to the window.

    Parameters
    ----------
    config
        All settings.
    """

    trend_matrix: Tensor

    def __init__(self, config: MoLEConfig) -> None:
        super().__init__(config, reads_time_features=config.router == "calendar")
        window = config.window
        backend = self.backend
        channels, experts = window.target_dim, config.num_experts
        calendar = config.router == "calendar"
        features = {
            "calendar": len(time_features(window.freq)),
            "statistics": 4,
            "window": window.context_length,
        }[config.router]
        self.router: Optional[MLPRouter] = None
        if experts > 1:
            self.router = MLPRouter(
                features + self.features.num_static,
                experts * channels if calendar else config.router_hidden_dimension,
                experts,
                top_k=config.top_k,
                noisy=config.noisy_routing,
                head_dropout=config.head_dropout,
                num_channels=channels if calendar else None,
                backend=backend,
            )
        parameters = self.parameter_head.in_features
        self.experts = nn.ModuleDict(
            {
                str(size): PatchedExperts(config, size, parameters, backend)
                for size in config.patch_sizes
            }
        )
        self.register_buffer(
            "trend_matrix",
            moving_average_matrix(window.context_length, config.moving_average),
            persistent=False,
        )
        self._matrices: Dict[str, Tuple[Tuple, LinearMixture]] = {}
        # Reversible instance normalisation's affine map (Kim et al. 2022) per channel.
        self.affine: Optional[nn.Parameter] = None
        if config.expert != "dlinear" and config.scaling == "std":
            self.affine = nn.Parameter(torch.zeros(2, channels))
        self.covariate_effect: Optional[nn.Module] = None
        known = window.num_feat_dynamic_real + self.features.num_static
        if known:
            last = nn.Linear(config.covariate_hidden_dimension, channels * parameters)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.covariate_effect = nn.Sequential(
                nn.Linear(known, config.covariate_hidden_dimension),
                nn.ReLU(),
                nn.Dropout(config.dropout),
                last,
            )

    def mixtures(self) -> Dict[str, Mixture]:
        if self.router is None:
            return {}
        banks: List[Union[LinearExperts, ResidualMLPExperts]] = []
        for experts in self.experts.values():
            assert isinstance(experts, PatchedExperts)
            banks.extend(bank for bank in (experts.residual, experts.linear) if bank is not None)
        return {"router": Mixture(self.router, banks)}

    def outputs(
        self, inputs: Mapping[str, Tensor], patch_size: Optional[int] = None
    ) -> NetworkOutput:
        scaled_BLC, loc, scale = self.scaler(inputs["past_target"], inputs["past_observed_values"])
        dynamic = self.features(inputs)
        static = self.features.static(inputs)
        size = str(patch_size or self.patch_sizes[0])
        affine_BLC, loc, scale = self._apply_affine(scaled_BLC, loc, scale)
        covariates = self._lookback_covariates(dynamic)
        if self.backend.folds and not (self.training or torch.is_grad_enabled()):
            features = self._router_features(inputs, scaled_BLC, static)
            raw_BHCK, routing = self._in_one(size, scaled_BLC, affine_BLC, covariates, features)
        else:
            routing = self._route(inputs, scaled_BLC, static)
            components = [*self._components(affine_BLC), *covariates]
            raw_BHCK = self.experts[size](components, routing.dense_weights())
        if self.covariate_effect is not None:
            raw_BHCK = raw_BHCK + self._covariates(dynamic, static).unflatten(
                -1, (raw_BHCK.shape[-2], -1)
            )
        return NetworkOutput(self.parameter_head(raw_BHCK), loc, scale, {"router": routing})

    def _route(
        self, inputs: Mapping[str, Tensor], scaled_BLC: Tensor, static: Optional[Tensor]
    ) -> Routing:
        """Weights of the experts for each series and channel ``[B, C, E]``."""
        if self.router is None:
            ones = scaled_BLC.new_ones(len(scaled_BLC), scaled_BLC.shape[-1], 1)
            return Routing(ones, torch.zeros_like(ones, dtype=torch.long), ones)
        return self.router(self._router_features(inputs, scaled_BLC, static))

    def _router_features(
        self, inputs: Mapping[str, Tensor], scaled_BLC: Tensor, static: Optional[Tensor]
    ) -> Tensor:
        """``[B, C, features]``, or without channels where they are common to all."""
        if self.config.router == "calendar":
            features = inputs["time_feat"][:, 0]
        elif self.config.router == "statistics":
            features = _window_statistics(inputs["past_target"])
        else:
            features = scaled_BLC.transpose(1, 2)
        if static is not None:
            if features.dim() == 3:
                static = static.unsqueeze(1).expand(-1, features.shape[1], -1)
            features = torch.cat([features, static], dim=-1)
        return features

    def _in_one(
        self,
        size: str,
        scaled_BLC: Tensor,
        affine_BLC: Tensor,
        covariates_BCL: List[Tensor],
        features: Tensor,
    ) -> Tuple[Tensor, Routing]:
        """Raw parameters ``[B, H, C, K]`` and the routing, by one call of the backend."""
        batch, _, channels = scaled_BLC.shape
        fold_affine = self.affine is not None and channels == 1
        series_BCL = (scaled_BLC if fold_affine else affine_BLC).transpose(1, 2)
        columns = [series_BCL, *covariates_BCL]
        num_read = sum(column.shape[-1] for column in columns)
        router_columns: List[int] = []
        if self.router is not None:
            if features.dim() == 2:
                features = features.unsqueeze(1).expand(-1, channels, -1)
            if self.config.router == "window" and (self.affine is None or fold_affine):
                # The router reads what the experts read.
                router_columns.extend(range(self.window.context_length))
                features = features[..., self.window.context_length :]
            columns.append(features)
            router_columns.extend(range(num_read, num_read + features.shape[-1] + 1))
        x_BCF = torch.cat([*columns, scaled_BLC.new_ones(batch, channels, 1)], dim=-1)
        mixture = self._folded(size, fold_affine, router_columns)
        grouped = any(len(part) > 1 for part in mixture if part is not None)
        x_GTF = x_BCF.transpose(0, 1) if grouped else x_BCF.flatten(0, 1).unsqueeze(0)
        top_k = 1 if self.router is None else self.router.top_k
        by_channel = (
            part.transpose(0, 1) if grouped else part[0].unflatten(0, (batch, channels))
            for part in self.backend.linear_mixture(x_GTF, mixture, top_k)
        )
        y_BCQ, *decided = by_channel
        raw_KBHC = y_BCQ.unflatten(-1, (-1, self.window.prediction_length)).permute(2, 0, 3, 1)
        return raw_KBHC.contiguous().movedim(0, -1), Routing(*decided)

    def _folded(self, size: str, fold_affine: bool, router_columns: List[int]) -> LinearMixture:
        """The network as matrices, made anew when a weight changed."""
        experts = self.experts[size]
        assert isinstance(experts, PatchedExperts)
        state = tuple(
            (0 if weight.is_inference() else weight._version, weight.data_ptr())
            for weight in self.parameters()
        )
        kept = self._matrices.get(size)
        if kept is None or kept[0] != state:
            affine = None
            if fold_affine and self.affine is not None:
                shift, log_gain = self.affine[:, 0]
                affine = shift, log_gain.exp()
            trend_matrix = self.trend_matrix if self.config.expert == "dlinear" else None
            with torch.no_grad():
                mixture = experts.folded(trend_matrix, affine)
                if self.router is not None:
                    mixture = fold_router(self.router, mixture, router_columns)
            kept = self._matrices[size] = state, mixture
        return kept[1]

    def _apply_affine(
        self, scaled_BLC: Tensor, loc: Tensor, scale: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor]:
        if self.affine is None:
            return scaled_BLC, loc, scale
        shift, log_gain = self.affine
        gain = log_gain.exp()
        # The inverse map of the forecast is one more change of location and scale.
        return scaled_BLC * gain + shift, loc - scale * shift / gain, scale / gain

    def _components(self, scaled_BLC: Tensor) -> List[Tensor]:
        series_BCL = scaled_BLC.transpose(1, 2)
        if self.config.expert != "dlinear":
            return [series_BCL]
        trend_BCL = (series_BCL.flatten(0, 1) @ self.trend_matrix).view_as(series_BCL)
        return [series_BCL - trend_BCL, trend_BCL]

    def _lookback_covariates(self, dynamic: Dict[str, Tensor]) -> List[Tensor]:
        """Each covariate's lookback ``[B, C, L]``, the same for every channel."""
        context, channels = self.window.context_length, self.window.target_dim
        return [
            feature.unsqueeze(1).expand(-1, channels, -1)
            for name in (FEAT_DYNAMIC_REAL, PAST_FEAT_DYNAMIC_REAL)
            if name in dynamic
            for feature in dynamic[name][:, :context].unbind(dim=-1)
        ]

    def _covariates(self, dynamic: Dict[str, Tensor], static: Optional[Tensor]) -> Tensor:
        """What is known of each step of the horizon adds this to its raw parameters."""
        assert self.covariate_effect is not None
        parts = []
        if FEAT_DYNAMIC_REAL in dynamic:
            parts.append(dynamic[FEAT_DYNAMIC_REAL][:, self.window.context_length :])
        if static is not None:
            parts.append(static.unsqueeze(1).expand(-1, self.window.prediction_length, -1))
        return self.covariate_effect(torch.cat(parts, dim=-1))


def _window_statistics(past_target_BLC: Tensor) -> Tensor:
    """Mean, deviation, minimum and maximum ``[B, C, 4]``, in units of the mean absolute value."""
    level = past_target_BLC.abs().mean(dim=1, keepdim=True)
    relative = past_target_BLC / torch.where(level > 0, level, torch.ones_like(level))
    statistics = [
        relative.mean(dim=1),
        relative.std(dim=1, correction=0),
        relative.amin(dim=1),
        relative.amax(dim=1),
    ]
    return torch.stack(statistics, dim=-1)


def moving_average_matrix(length: int, window: int) -> Tensor:
    """The centred moving average with repeated edges (Zeng et al. 2023) as one matrix ``[L, L]``.

    A row vector times the matrix is its moving average. One product is several times as fast as
    padding and pooling.
    """
    before = (window - 1) // 2
    padded = F.pad(torch.eye(length), (before, window - 1 - before), mode="replicate")
    return F.avg_pool1d(padded, window, stride=1)
