"""The hierarchical Autoformer as a GluonTS estimator."""

from typing import Optional

from typing_extensions import Unpack

from ..estimator import MoEEstimator, SharedSettings, takes_shared_settings
from ..predictor import MoEPredictor
from .config import AutoformerConfig
from .network import AutoformerNetwork


class HierarchicalAutoformerPredictor(MoEPredictor):
    """Forecasts of a trained :class:`AutoformerNetwork`; see :class:`MoEPredictor`."""


class HierarchicalAutoformerEstimator(MoEEstimator):
    """Auto-correlation over wavelet resolutions, with experts (after Wu et al. 2021).

    An encoder reads the context, as wavelet bands if ``wavelet`` names one, and a decoder continues
    its end over the horizon, season and trend apart. Their layers find the delays at which the
    series resembles itself and send each token through its best feed-forward. By default there is
    one resolution, and only the input is decomposed.

    Parameters
    ----------
    freq, prediction_length, context_length
        As for :class:`MoEEstimator`.
    label_length
        Steps at the end of the context that the decoder reads, too (default: half of it).
    d_model, d_ff
        Features of a token, and hidden features of a feed-forward.
    num_heads
        Heads of an auto-correlation, each with delays of its own.
    num_encoder_layers, num_decoder_layers
        Layers of each resolution, and of the decoder.
    num_experts, top_k
        Feed-forwards of each layer, and how many each token is sent through; ``None`` for all. 1
        expert is a plain feed-forward.
    wavelet
        A discrete wavelet of PyWavelets (``"haar"``, ``"db4"``, ``"sym4"``, …); ``None`` for a
        single resolution.
    wavelet_levels
        How often the sequence is halved; there is one band more.
    decomposition
        What is decomposed into season and trend: ``"input"``, whose trend is continued by a linear
        map, ``"layers"`` for this and what every layer puts out, or ``None``.
    moving_average
        The widest moving average of a decomposition, an odd number: of steps where the input is
        decomposed, of tokens in a layer.
    delay_factor
        Delays of a head are this times the logarithm of the number of tokens.
    dropout
        Probability that a number is dropped.
    **shared
        The settings that all models share: see :class:`MoEEstimator`. Here ``patch_size`` is 4 by
        default.

    Raises
    ------
    ValueError
        If a setting is out of range or unknown.

    Examples
    --------
    >>> estimator = HierarchicalAutoformerEstimator(freq="h", prediction_length=24)
    >>> predictor = estimator.train(dataset)  # doctest: +SKIP
    """

    predictor_class = HierarchicalAutoformerPredictor

    @takes_shared_settings(patch_size=4)
    def __init__(
        self,
        freq: Optional[str],
        prediction_length: int,
        context_length: Optional[int] = None,
        label_length: Optional[int] = None,
        d_model: int = 64,
        d_ff: int = 64,
        num_heads: int = 4,
        num_encoder_layers: int = 2,
        num_decoder_layers: int = 1,
        num_experts: int = 4,
        top_k: Optional[int] = 1,
        wavelet: Optional[str] = None,
        wavelet_levels: int = 2,
        decomposition: Optional[str] = "input",
        moving_average: int = 25,
        delay_factor: float = 1.0,
        dropout: float = 0.1,
        **shared: Unpack[SharedSettings],
    ) -> None:
        super().__init__(freq, prediction_length, context_length, **shared)
        self.network_config = AutoformerConfig(
            window=self.window,
            distr_output=self.distr_output,
            scaling=self.scaling,
            patch_sizes=self.patch_sizes,
            label_length=(
                max(1, self.context_length // 2) if label_length is None else label_length
            ),
            d_model=d_model,
            d_ff=d_ff,
            num_heads=num_heads,
            num_encoder_layers=num_encoder_layers,
            num_decoder_layers=num_decoder_layers,
            num_experts=num_experts,
            top_k=top_k,
            wavelet=wavelet,
            wavelet_levels=wavelet_levels,
            decomposition=decomposition,
            moving_average=moving_average,
            delay_factor=delay_factor,
            dropout=dropout,
            backend=self.backend,
        )

    def create_network(self) -> AutoformerNetwork:
        return AutoformerNetwork(self.network_config)
