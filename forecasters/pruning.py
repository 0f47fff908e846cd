"""Leaving out the experts that the routers of a trained model hardly use."""

from typing import Dict, List, Type, TypeVar

from gluonts.dataset.common import Dataset

from .network import ForecastNetwork
from .predictor import MoEPredictor

P = TypeVar("P", bound=MoEPredictor)


def unused_experts(predictor: MoEPredictor, least_share: float = 0.0) -> Dict[str, List[int]]:
    """Experts whose mean share in the mixtures of the last ``predict`` is at most ``least_share``.

    The ``top_k`` of a router that have the largest shares are never among them.

    Parameters
    ----------
    predictor
        What has forecast a data set.
    least_share
        Between 0 and 1.

    Returns
    -------
    dict
        By router, experts numbered as the network was made; routers without any are left out.

    Raises
    ------
    ValueError
        If ``least_share`` is out of range, or nothing has been forecast.
    """
    if not 0.0 <= least_share < 1.0:
        raise ValueError(f"least_share={least_share} must lie in [0, 1)")
    network = predictor.network
    shares = predictor.expert_usage.weight_share
    unused = {}
    for name, (router, _) in network.mixtures().items():
        if name not in shares:
            raise ValueError("the predictor has forecast nothing yet: call predict before")
        # A dense mixture needs one expert, a sparse one as many as it chooses.
        needed = router.top_k if router.top_k < router.num_experts else 1
        by_share = shares[name].argsort(kind="stable")[: len(shares[name]) - needed]
        numbers = network.kept_experts.get(name, list(range(router.num_experts)))
        found = sorted(numbers[i] for i in by_share if shares[name][i] <= least_share)
        if found:
            unused[name] = found
    return unused


def prune_experts(predictor: P, dataset: Dataset, least_share: float = 0.0) -> P:
    """A predictor without the experts that a data set hardly uses.

    Where weights of the chosen sum to 1, as in MOIRAI-MoE, a token forecasts as before unless one
    of its experts was left out. Under a linear router the weights are shares of a softmax over all
    experts, and those of the experts that stay grow by what the others had.

    Parameters
    ----------
    predictor
        A trained predictor; it stays as it is.
    dataset
        Series that are forecast to see which experts are used.
    least_share
        Experts whose mean share in the mixtures is at most this are left out; by default those
        that were never chosen.

    Returns
    -------
    MoEPredictor
        It is saved and loaded as any other; ``kept_experts`` says what it has.

    Raises
    ------
    ValueError
        If ``least_share`` is out of range.
    """
    for _ in predictor.predict(dataset):
        pass
    unused = unused_experts(predictor, least_share)
    old = predictor.network
    network: ForecastNetwork = type(old)(old.config)
    network.keep_experts(old.kept_experts)
    network.load_state_dict(old.state_dict())
    kept = {}
    for name, (router, _) in network.mixtures().items():
        numbers = old.kept_experts.get(name, list(range(router.num_experts)))
        kept[name] = [expert for expert in numbers if expert not in unused.get(name, ())]
    network.keep_experts({name: kept[name] for name in unused})
    cls: Type[P] = type(predictor)
    return cls(
        network.eval(),
        batch_size=predictor.batch_size,
        device=str(predictor.device),
        calibration=predictor.calibration,
        num_samples=predictor.num_samples,
        kept_experts=network.kept_experts,
    )
