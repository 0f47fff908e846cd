"""MoLE as a GluonTS estimator."""

from typing import Optional

from typing_extensions import Unpack

from ..estimator import MoEEstimator, SharedSettings, takes_shared_settings
from ..predictor import MoEPredictor
from .config import MoLEConfig
from .network import MoLENetwork


class MoLEPredictor(MoEPredictor):
    """Forecasts of a trained :class:`MoLENetwork`; see :class:`MoEPredictor`."""


class MoLEEstimator(MoEEstimator):
    """A probabilistic mixture of linear experts (Ni et al. 2024, arXiv 2312.06786).

    Several linear forecasters look at the same window; a router says how much each is heard.
    Beyond the paper, the experts put out the parameters of a distribution, routers may read the
    window itself and keep only the best experts, and the lookback may be folded into patches.

    Parameters
    ----------
    freq, prediction_length, context_length
        As for :class:`MoEEstimator`.
    num_experts
        Number of experts, 1 to 16.
    expert
        ``"dlinear"`` (trend and remainder of a moving average, one linear map each; Zeng et al.
        2023), ``"rlinear"`` (reversible normalisation and a linear map; Li et al. 2023) or
        ``"rmlp"`` (the same behind a residual layer of ReLUs).
    router
        ``"window"`` reads the scaled window, ``"statistics"`` its mean, deviation, minimum and
        maximum, ``"calendar"`` the time features of the window's first step, as in the paper.
    top_k
        Experts heard per window; ``None`` mixes all.
    noisy_routing
        Explore among experts in training by learned noise; needs ``top_k``.
    head_dropout
        Probability, in training, that an expert is not heard.
    individual
        Whether each channel of a multivariate target has weights of its own.
    moving_average
        Steps in DLinear's moving average.
    hidden_dimension
        Width of RMLP's layer.
    dropout
        Probability that one of its units is dropped.
    router_hidden_dimension
        Width of the router's layer, except for the calendar router's, which the paper fixes.
    covariate_hidden_dimension
        Width of the layer between known covariates and what they add to the experts' outputs.
    **shared
        The settings that all models share: see :class:`MoEEstimator`.

    Raises
    ------
    ValueError
        If a setting is out of range or unknown.

    Examples
    --------
    >>> estimator = MoLEEstimator(freq="h", prediction_length=24)
    >>> predictor = estimator.train(dataset)  # doctest: +SKIP
    """

    predictor_class = MoLEPredictor

    @takes_shared_settings()
    def __init__(
        self,
        freq: Optional[str],
        prediction_length: int,
        context_length: Optional[int] = None,
        num_experts: int = 8,
        expert: str = "rmlp",
        router: str = "window",
        top_k: Optional[int] = None,
        noisy_routing: bool = False,
        head_dropout: float = 0.0,
        individual: bool = False,
        moving_average: int = 25,
        hidden_dimension: int = 256,
        dropout: float = 0.1,
        router_hidden_dimension: int = 64,
        covariate_hidden_dimension: int = 64,
        **shared: Unpack[SharedSettings],
    ) -> None:
        super().__init__(freq, prediction_length, context_length, **shared)
        self.network_config = MoLEConfig(
            window=self.window,
            distr_output=self.distr_output,
            scaling=self.scaling,
            patch_sizes=self.patch_sizes,
            num_experts=num_experts,
            expert=expert,
            individual=individual,
            moving_average=moving_average,
            hidden_dimension=hidden_dimension,
            dropout=dropout,
            router=router,
            router_hidden_dimension=router_hidden_dimension,
            top_k=top_k,
            noisy_routing=noisy_routing,
            head_dropout=head_dropout,
            covariate_hidden_dimension=covariate_hidden_dimension,
            backend=self.backend,
        )

    def create_network(self) -> MoLENetwork:
        return MoLENetwork(self.network_config)
