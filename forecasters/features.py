"""Covariates and static features, made ready for a network."""

from typing import Dict, Mapping, Optional

import torch
from torch import Tensor, nn

from .fields import (
    FEAT_DYNAMIC_REAL,
    FEAT_STATIC_CAT,
    FEAT_STATIC_REAL,
    PAST_FEAT_DYNAMIC_REAL,
    WindowConfig,
)
from .series import SeriesArrays


class FeatureScaler(nn.Module):
    """Standardises features by moments of the training set; missing values become the mean.

    Parameters
    ----------
    num_features
        Number of features, the last dimension of the input.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))

    def forward(self, features: Tensor) -> Tensor:
        return ((features - self.loc) / self.scale).nan_to_num(nan=0.0)


class WindowFeatures(nn.Module):
    """Scales real features and embeds categories.

    Parameters
    ----------
    config
        Which features there are. A category of n values is embedded in min(50, (n + 1) // 2)
        dimensions, as GluonTS does.

    Attributes
    ----------
    num_static
        Number of static features after embedding.
    """

    def __init__(self, config: WindowConfig) -> None:
        super().__init__()
        widths = {**config.dynamic_fields, **config.static_fields}
        self.scalers = nn.ModuleDict(
            {
                name: FeatureScaler(widths[name])
                for name in (FEAT_DYNAMIC_REAL, PAST_FEAT_DYNAMIC_REAL, FEAT_STATIC_REAL)
                if name in widths
            }
        )
        self.embeddings = nn.ModuleList(
            nn.Embedding(size, min(50, (size + 1) // 2)) for size in config.cardinality
        )
        embedded = sum(min(50, (size + 1) // 2) for size in config.cardinality)
        self.num_static = config.num_feat_static_real + embedded

    def fit(self, series: SeriesArrays) -> None:
        """Take the moments of the training set."""
        for name, scaler in self.scalers.items():
            assert isinstance(scaler, FeatureScaler)
            mean, deviation = series.feature_moments(name)
            scaler.loc.copy_(torch.from_numpy(mean))
            scaler.scale.copy_(torch.from_numpy(deviation))

    def forward(self, inputs: Mapping[str, Tensor]) -> Dict[str, Tensor]:
        """The scaled dynamic features, under their names."""
        return {
            name: scaler(inputs[name])
            for name, scaler in self.scalers.items()
            if name != FEAT_STATIC_REAL
        }

    def static(self, inputs: Mapping[str, Tensor]) -> Optional[Tensor]:
        """Scaled and embedded static features ``[batch, num_static]``, if there are any."""
        parts = [
            embedding(inputs[FEAT_STATIC_CAT][:, column])
            for column, embedding in enumerate(self.embeddings)
        ]
        if FEAT_STATIC_REAL in self.scalers:
            parts.append(self.scalers[FEAT_STATIC_REAL](inputs[FEAT_STATIC_REAL]))
        return torch.cat(parts, dim=-1) if parts else None
