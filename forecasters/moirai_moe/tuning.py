"""Which weights of a pretrained network are trained."""

from typing import Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .network import MoiraiMoENetwork

TUNINGS = ("full", "last_layers", "low_rank")


class LowRankUpdate(nn.Module):
    """A weight plus a product of two thin matrices (Hu et al. 2022), one for each expert.

    Parameters
    ----------
    weight
        ``[…, I, O]``.
    rank
        Width of the matrices. The product starts at zero.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        *groups, rows, columns = weight.shape
        self.left = nn.Parameter(weight.new_zeros(*groups, rows, rank))
        self.right = nn.Parameter(weight.new_empty(*groups, rank, columns))
        nn.init.normal_(self.right, std=columns**-0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.left @ self.right


def prepare_tuning(
    network: MoiraiMoENetwork,
    tuning: str,
    num_tuned_layers: int,
    rank: int,
    tune_routers: bool,
) -> None:
    """Leave gradients to what is to be trained, and add low-rank updates if asked for.

    Parameters
    ----------
    tuning
        ``"full"``; ``"last_layers"`` for those, the last norm and the head's projection; or
        ``"low_rank"`` for updates of attention and experts, and the head's projection.
    num_tuned_layers
        For ``"last_layers"``.
    rank
        For ``"low_rank"``.
    tune_routers
        Whether the experts' centroids learn, too.
    """
    everything = tuning == "full"
    for parameter in network.parameters():
        parameter.requires_grad_(everything)
    head: List[Optional[nn.Module]] = [
        network.norm,
        network.parameter_projection,
        network.static_projection,
    ]
    trained = [module for module in head if module is not None]
    if tuning == "last_layers":
        trained += network.transformer_layers[-num_tuned_layers:]
    for module in trained:
        module.requires_grad_(True)
    if tuning == "low_rank":
        for module, name in _low_rank_weights(network):
            update = LowRankUpdate(getattr(module, name), rank)
            parametrize.register_parametrization(module, name, update)
    for layer in network.transformer_layers:
        layer.router.requires_grad_(tune_routers)


def finish_tuning(network: MoiraiMoENetwork) -> None:
    """Add low-rank updates to their weights, and leave a network like any other."""
    for module, name in _low_rank_weights(network):
        if parametrize.is_parametrized(module, name):
            with torch.no_grad():
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    network.requires_grad_(True)


def _low_rank_weights(network: MoiraiMoENetwork) -> Iterator[Tuple[nn.Module, str]]:
    for layer in network.transformer_layers:
        yield layer.attention.query_key_value, "weight"
        yield layer.attention.output, "weight"
        yield layer.experts, "expand"
        yield layer.experts, "contract"
