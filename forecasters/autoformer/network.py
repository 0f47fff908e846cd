"""The hierarchical Autoformer's network.

A window's context is cut into patches and embedded without positions. The encoder works on its
wavelet bands, a stack of layers for each, coarse bands read by finer ones, and puts them together
again. The decoder reads the end of the context once more, continued over the horizon: as a
seasonal path of tokens, and as a trend that stays on the scale of the data.

Shape suffixes: B series, T steps in time, C channels of the target, N patches, P steps of a patch,
D features of a token, K raw head parameters.
"""

from typing import Dict, List, Mapping, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...backends import Backend
from ..fields import FEAT_DYNAMIC_REAL, PAST_FEAT_DYNAMIC_REAL
from ..frequencies import time_features
from ..moe import Routing
from ..network import ForecastNetwork, Mixture, NetworkOutput
from .config import AutoformerConfig
from .layers import Layer, SequenceDropout, SeriesDecomposition, auto_correlation
from .wavelets import WaveletTransform


class AutoformerInputs(NamedTuple):
    """What encoder and decoder read, whole patches of it.

    Attributes
    ----------
    encoder
        ``[batch, context, channels]``: the target, where it was observed, known and past
        covariates.
    encoder_time
        ``[batch, context, time features]``.
    decoder
        ``[batch, label + horizon, channels]``: the seasonal part of the end of the context, the
        label, and zeros for the horizon; where it was observed; known covariates.
    decoder_time
        ``[batch, label + horizon, time features]``.
    trend
        The trend ``[batch, horizon, target]``, on the scale of the standardised window.

    The horizon here begins with the lead time.
    """

    encoder: Tensor
    encoder_time: Tensor
    decoder: Tensor
    decoder_time: Tensor
    trend: Tensor


class Embedding(nn.Module):
    """Patches of values and of time features as tokens, without positions.

    Parameters
    ----------
    num_values, num_time_features
        Numbers of each step.
    patch_size
        Steps of a patch.
    config
        The network's settings.
    """

    def __init__(
        self, num_values: int, num_time_features: int, patch_size: int, config: AutoformerConfig
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.values = nn.Linear(num_values * patch_size, config.d_model)
        self.time: Optional[nn.Linear] = None
        if num_time_features:
            self.time = nn.Linear(num_time_features * patch_size, config.d_model, bias=False)

    def forward(self, values_BTV: Tensor, time_BTF: Tensor) -> Tensor:
        """``[B, N, D]``."""
        tokens = self.values(self._patches(values_BTV))
        return tokens if self.time is None else tokens + self.time(self._patches(time_BTF))

    def _patches(self, x_BTV: Tensor) -> Tensor:
        return x_BTV.unflatten(1, (-1, self.patch_size)).flatten(2)


class Encoder(nn.Module):
    """Wavelet bands of the tokens, a stack of layers each, the coarsest first.

    A finer band reads the one before it by auto-correlation, then its own layers follow.
    """

    def __init__(self, config: AutoformerConfig, backend: Backend) -> None:
        super().__init__()
        self.wavelets: Optional[WaveletTransform] = None
        if config.wavelet is not None:
            self.wavelets = WaveletTransform(config.wavelet, config.wavelet_levels)
        self.stacks = nn.ModuleList(
            nn.ModuleList(
                Layer(config, backend, reads_memory=False) for _ in range(config.num_encoder_layers)
            )
            for _ in range(config.num_resolutions)
        )
        finer = range(config.num_resolutions - 1)
        self.read_coarser = nn.ModuleList(auto_correlation(config) for _ in finer)
        self.band_norms = nn.ModuleList(nn.LayerNorm(config.d_model) for _ in finer)
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, x_BND: Tensor, routings: Dict[str, Routing]) -> Tensor:
        """``[B, N, D]``; the routers' decisions are put into ``routings``."""
        if self.wavelets is None:
            return self.norm(self._stack(0, x_BND, routings))
        missing = -x_BND.shape[1] % self.wavelets.shortest
        bands: List[Tensor] = []
        for i, band in enumerate(self.wavelets.decompose(_extend(x_BND, missing))):
            if bands:
                band = band + self._read_coarser(i - 1, band, bands[-1])
            bands.append(self._stack(i, band, routings))
        return self.norm(self.wavelets.rebuild(bands)[:, missing:])

    def _read_coarser(self, i: int, band: Tensor, coarser: Tensor) -> Tensor:
        norm, length = self.band_norms[i], band.shape[1]
        stretched = coarser.repeat_interleave(length // coarser.shape[1], dim=1)
        return self.read_coarser[i](norm(band), norm(stretched), length)

    def _stack(self, resolution: int, x: Tensor, routings: Dict[str, Routing]) -> Tensor:
        layers = self.stacks[resolution]
        assert isinstance(layers, nn.ModuleList)
        for i, layer in enumerate(layers):
            x, _, routing = layer(x)
            if routing is not None:
                routings[f"encoder.{resolution}.{i}"] = routing
        return x


class Decoder(nn.Module):
    """Layers that read the encoder, on the time axis of context and horizon."""

    def __init__(self, config: AutoformerConfig, backend: Backend) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(config, backend, reads_memory=True) for _ in range(config.num_decoder_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)

    def forward(
        self, x_BND: Tensor, memory_BND: Tensor, horizon: int, routings: Dict[str, Routing]
    ) -> List[Tensor]:
        """Season, and trend where layers are decomposed, of the last ``horizon`` tokens.

        Each is ``[B, horizon, D]``.
        """
        length = memory_BND.shape[1] + horizon
        trends = []
        for i, layer in enumerate(self.layers):
            num_read = horizon if i + 1 == len(self.layers) else None
            x_BND, trend, routing = layer(x_BND, memory_BND, length, num_read)
            if trend is not None:
                trends.append(trend[:, -horizon:])
            if routing is not None:
                routings[f"decoder.{i}"] = routing
        season = self.norm(x_BND[:, -horizon:])
        return [season, torch.stack(trends).sum(dim=0)] if trends else [season]


class AutoformerNetwork(ForecastNetwork):
    """Auto-correlation over wavelet resolutions, with experts in every layer.

    Parameters
    ----------
    config
        All settings.
    """

    level: Tensor
    location_direction: Tensor

    def __init__(self, config: AutoformerConfig) -> None:
        num_time_features = len(time_features(config.window.freq))
        super().__init__(
            config, reads_time_features=num_time_features > 0, forecasts_lead_time=True
        )
        window, width = config.window, config.d_model
        backend = self.backend
        channels, parameters = window.target_dim, self.parameter_head.in_features
        decoded = 2 * channels + window.num_feat_dynamic_real
        encoded = decoded + window.num_past_feat_dynamic_real
        self.encoder_embeddings, self.decoder_embeddings, self.projections = (
            nn.ModuleDict(),
            nn.ModuleDict(),
            nn.ModuleDict(),
        )
        # Season, and the trend that layers took out.
        num_paths = 2 if config.decomposition == "layers" else 1
        for size in config.patch_sizes:
            self.encoder_embeddings[str(size)] = Embedding(encoded, num_time_features, size, config)
            self.decoder_embeddings[str(size)] = Embedding(decoded, num_time_features, size, config)
            self.projections[str(size)] = nn.ModuleList(
                nn.Linear(width, parameters * size * channels) for _ in range(num_paths)
            )
        self.static_projection: Optional[nn.Linear] = None
        if self.features.num_static:
            self.static_projection = nn.Linear(self.features.num_static, width, bias=False)
        self.dropout = SequenceDropout(config.dropout)
        self.decomposition: Optional[SeriesDecomposition] = None
        if config.decomposition is not None:
            self.decomposition = SeriesDecomposition(channels, config.moving_average)
            # What is learned is the difference, so that weight decay leads back to the buffer.
            level = _between_mean_and_end(window.context_length, window.future_length)
            self.register_buffer("level", level, persistent=False)
            self.continuation = nn.Parameter(torch.zeros_like(level))
        self.encoder = Encoder(config, backend)
        self.decoder = Decoder(config, backend)
        self.register_buffer(
            "location_direction", self.parameter_head.location_direction(), persistent=False
        )

    def mixtures(self) -> Dict[str, Mixture]:
        stacks = [(f"encoder.{i}", stack) for i, stack in enumerate(self.encoder.stacks)]
        mixtures = {}
        for name, stack in [*stacks, ("decoder", self.decoder.layers)]:
            assert isinstance(stack, nn.ModuleList)
            for i, layer in enumerate(stack):
                assert isinstance(layer, Layer)
                router, experts = layer.feed_forward.router, layer.feed_forward.experts
                if router is not None:
                    mixtures[f"{name}.{i}"] = Mixture(router, [experts])
        return mixtures

    def outputs(
        self, inputs: Mapping[str, Tensor], patch_size: Optional[int] = None
    ) -> NetworkOutput:
        patch_size = patch_size or self.patch_sizes[0]
        size = str(patch_size)
        scaled_BTC, loc, scale = self.scaler(inputs["past_target"], inputs["past_observed_values"])
        read = self.read(inputs, scaled_BTC, patch_size)
        routings: Dict[str, Routing] = {}
        encoded = self.encoder_embeddings[size](read.encoder, read.encoder_time)
        decoded = self.decoder_embeddings[size](read.decoder, read.decoder_time)
        static = self.features.static(inputs)
        if self.static_projection is not None:
            static_B1D = self.static_projection(static).unsqueeze(1)
            encoded, decoded = encoded + static_B1D, decoded + static_B1D
        memory = self.encoder(self.dropout(encoded), routings)
        horizon = read.trend.shape[1] // patch_size
        paths = self.decoder(self.dropout(decoded), memory, horizon, routings)
        raw_BTCK = self._fuse(paths, read.trend, patch_size)
        lead = self.window.lead_time
        distr_args = self.parameter_head(raw_BTCK[:, lead : self.window.future_length])
        return NetworkOutput(distr_args, loc, scale, routings)

    def read(
        self, inputs: Mapping[str, Tensor], scaled_BTC: Tensor, patch_size: int
    ) -> AutoformerInputs:
        """The inputs of encoder and decoder, see :class:`AutoformerInputs`.

        A context that is no multiple of the patch begins with its first step repeated, marked as
        not observed, and the horizon ends with its last.
        """
        context, future = self.window.context_length, self.window.future_length
        nothing = scaled_BTC.new_zeros(len(scaled_BTC), context + future, 0)
        dynamic = self.features(inputs)
        known = dynamic.get(FEAT_DYNAMIC_REAL, nothing)
        past = dynamic.get(PAST_FEAT_DYNAMIC_REAL, nothing[:, :context])
        time = inputs["time_feat"] if self.reads_time_features else nothing
        before, behind = -context % patch_size, -future % patch_size
        num_label = -(-self.config.label_length // patch_size) * patch_size

        scaled = _extend(scaled_BTC, before)
        seasonal, trend = scaled, scaled.new_zeros(len(scaled), future + behind, scaled.shape[-1])
        if self.decomposition is not None:
            seasonal, past_trend = self.decomposition(scaled)
            continuation = self.level + self.continuation
            trend = _extend(continuation @ past_trend[:, before:], 0, behind)
        observed = F.pad(inputs["past_observed_values"], (0, 0, before, 0))
        known, time = (_extend(x, before, behind) for x in (known, time))
        label = F.pad(torch.cat([seasonal, observed], dim=-1), (0, 0, 0, future + behind))
        begin = max(0, scaled.shape[1] - num_label)
        return AutoformerInputs(
            torch.cat(
                [scaled, observed, known[:, : scaled.shape[1]], _extend(past, before)], dim=-1
            ),
            time[:, : scaled.shape[1]],
            torch.cat([label, known], dim=-1)[:, begin:],
            time[:, begin:],
            trend,
        )

    def _fuse(self, paths: List[Tensor], trend_BTC: Tensor, patch_size: int) -> Tensor:
        """Raw head parameters ``[B, T, C, K]`` of the decoder's paths and the data's trend.

        The paths are added up under learned weights, which are their projections.
        """
        projections = self.projections[str(patch_size)]
        assert isinstance(projections, nn.ModuleList)
        # The steps of one parameter lie side by side, so that the head's maths is vectorised.
        shape = self.location_direction.shape[0], patch_size, -1
        raw_BNKPC = torch.stack(
            [projection(path).unflatten(-1, shape) for projection, path in zip(projections, paths)]
        ).sum(dim=0)
        raw_BTCK = raw_BNKPC.movedim(2, 0).flatten(2, 3).movedim(0, -1)
        return raw_BTCK + trend_BTC.unsqueeze(-1) * self.location_direction


def _between_mean_and_end(context: int, horizon: int) -> Tensor:
    """A linear map ``[horizon, context]`` of a level half way between the mean and the end."""
    weights = torch.full((horizon, context), 0.5 / context)
    weights[:, -1] += 0.5
    return weights


def _extend(x_BTV: Tensor, before: int, behind: int = 0) -> Tensor:
    """The first step repeated ``before`` times, the last ``behind`` times."""
    if not before and not behind:
        return x_BTV
    ends = x_BTV[:, :1].expand(-1, before, -1), x_BTV[:, -1:].expand(-1, behind, -1)
    return torch.cat([ends[0], x_BTV, ends[1]], dim=1)
