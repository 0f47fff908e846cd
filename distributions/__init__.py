"""Distribution heads: from a network's outputs to parameters, a loss, quantiles and forecasts."""

from .beta import Beta, BetaOutput
from .counts import (
    NegativeBinomial,
    NegativeBinomialOutput,
    Poisson,
    PoissonOutput,
    ZeroInflated,
    ZeroInflatedNegativeBinomialOutput,
)
from .gamma import Gamma, GammaOutput
from .gaussian_copula import GaussianCopula, GaussianCopulaOutput, copula_log_density
from .head import Head, above_two, positive, real
from .implicit_quantiles import ImplicitQuantiles, ImplicitQuantilesOutput
from .laplace import Laplace, LaplaceOutput
from .log_normal import LogNormal, LogNormalOutput
from .mixture import Mixture, MixtureOutput
from .names import HEADS, resolve_head
from .normal import Normal, NormalFixedScaleOutput, NormalOutput
from .parameters import (
    ParameterHead,
    has_cdf,
    scales_parameters,
    scaling_for,
    support_of,
    window_loss,
)
from .pareto_tails import ParetoTails, ParetoTailsOutput
from .point import PointOutput
from .published import (
    head_from_published,
    head_to_published,
    parameters_from_published,
    parameters_to_published,
)
from .quantile_spline import QuantileSpline, QuantileSplineOutput
from .quantiles import QuantileOutput
from .student_t import StudentT, StudentTOutput
from .truncated_normal import TruncatedNormal, TruncatedNormalOutput
from .univariate import AffineDistribution, UnivariateDistribution, probability_transform

__all__ = [
    "HEADS",
    "AffineDistribution",
    "Beta",
    "BetaOutput",
    "Gamma",
    "GammaOutput",
    "GaussianCopula",
    "GaussianCopulaOutput",
    "Head",
    "ImplicitQuantiles",
    "ImplicitQuantilesOutput",
    "Laplace",
    "LaplaceOutput",
    "LogNormal",
    "LogNormalOutput",
    "Mixture",
    "MixtureOutput",
    "NegativeBinomial",
    "NegativeBinomialOutput",
    "Normal",
    "NormalFixedScaleOutput",
    "NormalOutput",
    "ParameterHead",
    "ParetoTails",
    "ParetoTailsOutput",
    "PointOutput",
    "Poisson",
    "PoissonOutput",
    "QuantileOutput",
    "QuantileSpline",
    "QuantileSplineOutput",
    "StudentT",
    "StudentTOutput",
    "TruncatedNormal",
    "TruncatedNormalOutput",
    "UnivariateDistribution",
    "ZeroInflated",
    "ZeroInflatedNegativeBinomialOutput",
    "above_two",
    "copula_log_density",
    "has_cdf",
    "head_from_published",
    "head_to_published",
    "parameters_from_published",
    "parameters_to_published",
    "positive",
    "probability_transform",
    "real",
    "resolve_head",
    "scales_parameters",
    "scaling_for",
    "support_of",
    "window_loss",
]
