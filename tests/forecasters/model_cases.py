"""The models and heads that this folder's tests run through, and tiny series for them.

A new model joins every conformance test by one entry in ``MODELS``, a new head by one in
``HEADS``.
"""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import pandas as pd
import torch
from gluonts.torch.distributions import (
    GammaOutput,
    ImplicitQuantileNetworkOutput,
    PoissonOutput,
)
from gluonts.torch.distributions import QuantileOutput as GluonTSQuantileOutput
from moecast.distributions import HEADS as SHORT_NAMES
from moecast.forecasters import (
    HierarchicalAutoformerEstimator,
    MoEEstimator,
    MoEPredictor,
    MoiraiMoEEstimator,
    MoLEEstimator,
)

FREQ = "h"
HORIZON = 4
CONTEXT = 16
LEVELS = (0.1, 0.5, 0.9)

QUIET = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu"}

SHARED = {
    "freq": FREQ,
    "prediction_length": HORIZON,
    "context_length": CONTEXT,
    "batch_size": 8,
    "num_batches_per_epoch": 5,
    "lr": 1e-2,
    "seed": 0,
    "trainer_kwargs": {**QUIET, "max_epochs": 2},
}

Factory = Callable[..., MoEEstimator]


def mole(**own: Any) -> Factory:
    """A factory of tiny MoLE estimators; what the caller gives wins."""
    tiny = {
        "num_experts": 3,
        "hidden_dimension": 8,
        "router_hidden_dimension": 8,
        "covariate_hidden_dimension": 8,
    }

    def make(**overrides: Any) -> MoLEEstimator:
        return MoLEEstimator(**{**SHARED, **tiny, **own, **overrides})

    return make


def moirai_moe(**own: Any) -> Factory:
    """A factory of tiny MOIRAI-MoE estimators; what the caller gives wins."""
    tiny = {
        "d_model": 16,
        "d_ff": 8,
        "num_layers": 2,
        "num_heads": 2,
        "num_experts": 4,
        "patch_size": 4,
        "num_samples": 20,
    }

    def make(**overrides: Any) -> MoiraiMoEEstimator:
        return MoiraiMoEEstimator(**{**SHARED, **tiny, **own, **overrides})

    return make


def autoformer(**own: Any) -> Factory:
    """A factory of tiny hierarchical Autoformers; what the caller gives wins."""
    tiny = {
        "d_model": 8,
        "d_ff": 8,
        "num_heads": 2,
        "num_encoder_layers": 1,
        "moving_average": 5,
        "patch_size": 2,
    }

    def make(**overrides: Any) -> HierarchicalAutoformerEstimator:
        return HierarchicalAutoformerEstimator(**{**SHARED, **tiny, **own, **overrides})

    return make


MODELS: dict[str, Factory] = {
    "mole rmlp": mole(),
    "mole dlinear calendar": mole(
        expert="dlinear", router="calendar", moving_average=5, head_dropout=0.2
    ),
    # Hours have candidates from 32 steps on, of which two must fit into the context.
    "mole patch auto": mole(expert="rlinear", patch_size="auto", context_length=64),
    "mole top-2 noisy": mole(top_k=2, noisy_routing=True),
    "autoformer": autoformer(patch_size=[1, 3]),
    "autoformer wavelets": autoformer(wavelet="db2", decomposition="layers"),
    "moirai-moe": moirai_moe(patch_size=[6, 8]),
    "moirai-moe paths": moirai_moe(patch_size=2),
}

# Those whose forecasts are paths, which need heads that can be drawn from patch by patch, and
# those whose forecasts are distributions of each step.
PATH_MODELS = ["moirai-moe paths"]
DISTRIBUTION_MODELS = [name for name in MODELS if name not in PATH_MODELS]
NOT_FOR_PATHS = {
    "gluonts implicit quantiles",
    "gluonts quantile",
    "point",
    "quantile(0.1, 0.5, 0.9)",
}

# Those whose covariates act on their own step, instead of through the tokens of whole patches.
STEPWISE_MODELS = [name for name in MODELS if name.startswith("mole")]
# Those whose series have as many tokens as each other, whatever their patch sizes.
EQUAL_TOKENS_MODELS = [*STEPWISE_MODELS, "autoformer wavelets", *PATH_MODELS]

# Each head with the kind of series it is for. Every short name is there, with arguments where
# it needs them; to these come heads built from others, and GluonTS's own.
KINDS = {
    "beta": "shares",
    "gamma": "positive",
    "log_normal": "positive",
    "mixture(student_t, negative_binomial)": "counts",
    "mixture(poisson, negative_binomial)": "counts",
    "gaussian_copula(negative_binomial)": "counts",
    "negative_binomial": "counts",
    "negative_binomial(loss=crps)": "counts",
    "poisson": "counts",
    "truncated_normal": "positive",
    "zero_inflated_negative_binomial": "counts",
}
EXPRESSIONS = [
    *(name for name in SHORT_NAMES if name not in ("mixture", "quantile")),
    "mixture(student_t, negative_binomial)",
    "mixture(poisson, negative_binomial)",
    "gaussian_copula(negative_binomial)",
    "negative_binomial(loss=crps)",
    "pareto_tails(student_t)",
    "quantile(0.1, 0.5, 0.9)",
    "student_t(loss=crps)",
    "truncated_normal(-40, 80, loss=crps)",
]
HEADS: dict[str, tuple[Any, str]] = {
    **{expression: (expression, KINDS.get(expression, "real")) for expression in EXPRESSIONS},
    "gluonts gamma": (GammaOutput(), "positive"),
    "gluonts implicit quantiles": (ImplicitQuantileNetworkOutput(), "real"),
    "gluonts poisson": (PoissonOutput(), "counts"),
    "gluonts quantile": (GluonTSQuantileOutput(quantiles=[0.1, 0.5, 0.9]), "real"),
}


def series(
    kind: str = "real",
    *,
    number: int = 4,
    length: int = 120,
    channels: int | None = None,
    features: bool = False,
    beyond: int = 0,
) -> list[dict]:
    """Hourly series with a daily season and noise, each a little longer than the one before.

    Parameters
    ----------
    kind
        ``"real"``, ``"counts"`` (whole numbers, some 0), ``"positive"`` or ``"shares"``.
    channels
        ``None`` for univariate series.
    features
        Add two known and one past covariate, a real and two categorical static features (3 and
        2 categories), and a field that no model knows.
    beyond
        Steps by which the known covariates reach beyond the target.
    """
    generator = np.random.default_rng(0)
    entries = []
    for i in range(number):
        steps = length + 7 * i
        shape = (steps,) if channels is None else (channels, steps)
        season = np.sin(2 * np.pi * (np.arange(steps) + 3 * i) / 24)
        noise = generator.normal(size=shape)
        target = {
            "real": 10.0 * i + 5 * season + noise,
            "counts": np.maximum(np.round(4 + i + 3 * season + 2 * noise), 0),
            "positive": np.exp(0.5 * season + 0.2 * noise + i),
            "shares": 1 / (1 + np.exp(season + 0.3 * noise - 0.2 * i)),
        }[kind]
        entry: dict[str, Any] = {
            "item_id": f"series {i}",
            "start": pd.Period("2024-01-01", freq=FREQ) + 5 * i,
            "target": target.astype(np.float32),
        }
        if features:
            entry["feat_dynamic_real"] = generator.normal(size=(2, steps + beyond))
            entry["past_feat_dynamic_real"] = generator.normal(size=(1, steps))
            entry["feat_static_real"] = [float(i)]
            entry["feat_static_cat"] = [i % 3, i % 2]
            entry["stray"] = "unknown to every model"
        entries.append(entry)
    return entries


FEATURES = {
    "num_feat_dynamic_real": 2,
    "num_past_feat_dynamic_real": 1,
    "num_feat_static_real": 1,
    "num_feat_static_cat": 2,
    "cardinality": [3, 2],
}


def forecast_values(predictor: MoEPredictor, dataset: Any, seed: int = 0) -> np.ndarray:
    """Mean and quantiles ``[series, 1 + level, horizon(, channel)]``.

    Heads that can only sample draw from torch's generator, which is seeded here.
    """
    torch.manual_seed(seed)
    return np.stack(
        [
            np.stack([forecast.mean, *(forecast.quantile(level) for level in LEVELS)])
            for forecast in predictor.predict(dataset)
        ]
    )


def same_weights(this: torch.nn.Module, that: torch.nn.Module) -> bool:
    ours, theirs = this.state_dict(), that.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def untrained(estimator: MoEEstimator, seed: int = 0) -> MoEPredictor:
    """A predictor whose every parameter is random, so that no part of it is inactive."""
    torch.manual_seed(seed)
    module = estimator.create_lightning_module()
    with torch.no_grad():
        for parameter in module.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return estimator.create_predictor(estimator.create_transformation(), module.eval())
