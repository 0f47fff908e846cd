"""Nine deciles of 1,024 × 96 distributions: every head against scipy and GluonTS, in turn.

    python benchmarks/head_quantiles.py
    python benchmarks/head_quantiles.py --heads "mixture(student_t, normal)" --rounds 7

Parameters come from seeded random numbers through each head, in single precision, with a location
and a scale for each of the 1,024 series. Timed are the head's ``distribution(…).icdf(levels)``,
scipy.stats on the same parameters (all levels at once, in double precision), and GluonTS's own
head where its distribution has an inverse cdf; printed are the medians of the rounds, after one
that does not count.

scipy has no mixtures. For them (*) stands a root search for each element and level by
scipy.optimize.brentq on the weighted cdfs of scipy.special (or, with ``--cdfs stats`` and many
times slower, of frozen distributions), to single precision, between the components' quantiles,
whose computation is not timed; it is timed on a sample of the elements and scaled up to all. The
last column is the largest difference from scipy's answers (mixtures: from the sample's), as
|difference| / (1 + |answer|).
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import gluonts.torch.distributions as gluonts_distributions
import numpy as np
import torch
from gluonts.torch.distributions import DistributionOutput
from machine import describe_machine
from moecast.distributions import (
    HEADS,
    AffineDistribution,
    Beta,
    Gamma,
    GaussianCopula,
    Head,
    Laplace,
    LogNormal,
    Mixture,
    NegativeBinomial,
    Normal,
    ParameterHead,
    ParetoTails,
    Poisson,
    StudentT,
    TruncatedNormal,
    UnivariateDistribution,
    ZeroInflated,
    resolve_head,
)
from moecast.evaluation import DECILES
from scipy import optimize, special, stats
from torch import Tensor

SHAPE = (1024, 96)
LEVELS = torch.tensor(DECILES).reshape(-1, 1, 1)
MIXTURES = (
    "mixture(student_t, normal)",
    "mixture(student_t, negative_binomial)",
    "mixture(poisson, negative_binomial)",
)
GLUONTS = {
    "laplace": "LaplaceOutput",
    "negative_binomial": "NegativeBinomialOutput",
    "normal": "NormalOutput",
    "student_t": "StudentTOutput",
}
ROOT_TOLERANCE, BRACKET_MARGIN = 1e-7, 1e-6

Quantiles = Callable[[np.ndarray], np.ndarray]
Cdf = Callable[[float], float]


class Parameters(NamedTuple):
    """What a head is timed on."""

    raw: Tensor
    loc: Tensor
    scale: Tensor


def head_names() -> List[str]:
    """All heads that have a distribution, as they can be named without further arguments."""
    names = [name for name in HEADS if name != "mixture"]
    return [name for name in names if isinstance(resolve_head(name), Head)] + list(MIXTURES)


def draw_parameters(head: Head, seed: int) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    raw = draw(*SHAPE, ParameterHead(head).in_features)
    return Parameters(raw, loc=10 * draw(SHAPE[0], 1), scale=torch.exp(1 + draw(SHAPE[0], 1)))


def as_array(values: Tensor) -> np.ndarray:
    return values.detach().to(torch.float64).numpy()


def failure_of(distribution: NegativeBinomial) -> Tensor:
    return torch.sigmoid(-distribution.logits.to(torch.float64))


FROZEN: Dict[type, Callable[[Any], Any]] = {
    Beta: lambda d: stats.beta(as_array(d.concentration1), as_array(d.concentration0)),
    Gamma: lambda d: stats.gamma(as_array(d.concentration), scale=1 / as_array(d.rate)),
    Laplace: lambda d: stats.laplace(as_array(d.loc), as_array(d.scale)),
    LogNormal: lambda d: stats.lognorm(as_array(d.scale), scale=np.exp(as_array(d.loc))),
    NegativeBinomial: lambda d: stats.nbinom(as_array(d.total_count), as_array(failure_of(d))),
    Normal: lambda d: stats.norm(as_array(d.loc), as_array(d.scale)),
    Poisson: lambda d: stats.poisson(as_array(d.rate)),
    StudentT: lambda d: stats.t(as_array(d.df), as_array(d.loc), as_array(d.scale)),
    TruncatedNormal: lambda d: stats.truncnorm(
        (d.lower - as_array(d.loc)) / as_array(d.scale),
        (d.upper - as_array(d.loc)) / as_array(d.scale),
        as_array(d.loc),
        as_array(d.scale),
    ),
}


def scipy_quantiles(distribution: UnivariateDistribution) -> Optional[Quantiles]:
    """The same quantiles by scipy.stats; ``None`` where it has no such distribution."""
    if isinstance(distribution, GaussianCopula):
        return scipy_quantiles(distribution.marginals)
    if isinstance(distribution, AffineDistribution):
        base = scipy_quantiles(distribution.base)
        loc, scale = as_array(distribution.loc), as_array(distribution.scale)
        return None if base is None else lambda levels: base(levels) * scale + loc
    if isinstance(distribution, ZeroInflated):
        counts = scipy_quantiles(distribution.base)
        gate = special.expit(as_array(distribution.gate_logits))
        assert counts is not None
        return lambda levels: counts(np.maximum(levels - gate, 0.0) / (1 - gate))
    if isinstance(distribution, ParetoTails):
        return partial(spliced_quantiles, distribution)
    if type(distribution) not in FROZEN:
        return None
    counted = distribution.is_discrete
    frozen = FROZEN[type(distribution)](distribution)
    # scipy's quantile at level 0 is below the support.
    return lambda levels: np.maximum(frozen.ppf(levels), 0.0) if counted else frozen.ppf(levels)


def spliced_quantiles(distribution: ParetoTails, levels: np.ndarray) -> np.ndarray:
    body, mass = scipy_quantiles(distribution.body), distribution.tail_mass
    assert body is not None
    names = "lower_scale", "lower_shape", "upper_scale", "upper_shape"
    low_scale, low_shape, high_scale, high_shape = (
        as_array(getattr(distribution, name)) for name in names
    )
    low = stats.genpareto(low_shape, scale=low_scale).isf(np.minimum(levels / mass, 1.0))
    high = stats.genpareto(high_shape, scale=high_scale).isf(np.minimum((1 - levels) / mass, 1.0))
    return body(np.clip(levels, mass, 1 - mass)) - low + high


def normal_cdf(loc: float, scale: float, x: float) -> float:
    return float(special.ndtr((x - loc) / scale))


def student_t_cdf(df: float, loc: float, scale: float, x: float) -> float:
    return float(special.stdtr(df, (x - loc) / scale))


def log_normal_cdf(loc: float, scale: float, x: float) -> float:
    return float(special.ndtr((np.log(x) - loc) / scale)) if x > 0 else 0.0


def poisson_cdf(rate: float, x: float) -> float:
    return float(special.pdtr(np.floor(x), rate)) if x >= 0 else 0.0


def negative_binomial_cdf(total_count: float, failure: float, x: float) -> float:
    return float(special.betainc(total_count, np.floor(x) + 1, failure)) if x >= 0 else 0.0


def affine_cdf(base: Cdf, loc: float, scale: float, x: float) -> float:
    return base((x - loc) / scale)


class ElementCdf(NamedTuple):
    """One element's cdf: by scipy.special, by a frozen distribution, and of which parameters."""

    by_special: Callable[..., float]
    by_stats: Callable[..., Any]
    parameters_of: Callable[[Any], Tuple[Tensor, ...]]


ELEMENT_CDFS: Dict[type, ElementCdf] = {
    LogNormal: ElementCdf(
        log_normal_cdf,
        lambda loc, scale: stats.lognorm(scale, scale=np.exp(loc)),
        lambda d: (d.loc, d.scale),
    ),
    NegativeBinomial: ElementCdf(
        negative_binomial_cdf, stats.nbinom, lambda d: (d.total_count, failure_of(d))
    ),
    Normal: ElementCdf(normal_cdf, stats.norm, lambda d: (d.loc, d.scale)),
    Poisson: ElementCdf(poisson_cdf, stats.poisson, lambda d: (d.rate,)),
    StudentT: ElementCdf(student_t_cdf, stats.t, lambda d: (d.df, d.loc, d.scale)),
}


def element_cdfs(
    distribution: UnivariateDistribution, elements: np.ndarray, frozen: bool
) -> List[Cdf]:
    """The cdf of each of some elements, by scipy.stats if frozen and else by scipy.special."""

    def pick(values: Tensor) -> List[float]:
        return np.broadcast_to(as_array(values), SHAPE).reshape(-1)[elements].tolist()

    if isinstance(distribution, AffineDistribution):
        bases = element_cdfs(distribution.base, elements, frozen)
        rows = zip(bases, pick(distribution.loc), pick(distribution.scale))
        return [partial(affine_cdf, *row) for row in rows]
    cdf = ELEMENT_CDFS[type(distribution)]
    parameters = zip(*map(pick, cdf.parameters_of(distribution)))
    if frozen:
        return [cdf.by_stats(*row).cdf for row in parameters]
    return [partial(cdf.by_special, *row) for row in parameters]


def is_mixture(distribution: UnivariateDistribution) -> bool:
    """Whether a distribution is a mixture, or one shifted and stretched."""
    if isinstance(distribution, AffineDistribution):
        distribution = distribution.base
    return isinstance(distribution, Mixture)


class RootSearch:
    """Quantiles of some elements of a mixture, each found by itself.

    Parameters
    ----------
    mixture
        Itself, or shifted and stretched.
    elements
        Which, of the flattened shape.
    frozen
        Take the components' cdfs from frozen distributions of scipy.stats, not scipy.special.
    """

    def __init__(self, mixture: UnivariateDistribution, elements: np.ndarray, frozen: bool) -> None:
        self.loc, self.scale = np.zeros(1), np.ones(1)
        if isinstance(mixture, AffineDistribution):
            self.loc, self.scale = (
                np.broadcast_to(as_array(values), SHAPE).reshape(-1)[elements]
                for values in (mixture.loc, mixture.scale)
            )
            mixture = mixture.base
        assert isinstance(mixture, Mixture)
        weights = as_array(mixture.weights_logits.to(torch.float64).softmax(dim=-1))
        self.weights = weights.reshape(-1, weights.shape[-1])[elements].tolist()
        parts = [element_cdfs(part, elements, frozen) for part in mixture.components]
        self.cdfs = list(zip(*parts))
        self.rounded = mixture.is_discrete
        quantiles = []
        for part in mixture.components:
            of_levels = scipy_quantiles(part)
            assert of_levels is not None
            values = np.broadcast_to(of_levels(as_array(LEVELS)), (len(DECILES), *SHAPE))
            quantiles.append(values.reshape(len(DECILES), -1)[:, elements])
        low, high = np.min(quantiles, axis=0), np.max(quantiles, axis=0)
        self.low = low - BRACKET_MARGIN * (1 + np.abs(low))
        self.high = high + BRACKET_MARGIN * (1 + np.abs(high))

    def __call__(self) -> np.ndarray:
        """``[level, element]``."""
        levels = as_array(LEVELS).reshape(-1).tolist()
        found = np.empty_like(self.low)
        for element, (weights, cdfs) in enumerate(zip(self.weights, self.cdfs)):
            for row, level in enumerate(levels):

                def excess(
                    x: float,
                    weights: List[float] = weights,
                    cdfs: Tuple[Cdf, ...] = cdfs,
                    level: float = level,
                ) -> float:
                    return sum(weight * cdf(x) for weight, cdf in zip(weights, cdfs)) - level

                found[row, element] = optimize.brentq(
                    excess,
                    self.low[row, element],
                    self.high[row, element],
                    xtol=ROOT_TOLERANCE,
                    rtol=ROOT_TOLERANCE,
                )
        found = np.round(found) if self.rounded else found
        return found * self.scale + self.loc


def gluonts_quantiles(name: str, parameters: Parameters) -> Callable[[], Tensor]:
    head: DistributionOutput = getattr(gluonts_distributions, GLUONTS[name])()
    raw = parameters.raw.split(list(head.args_dim.values()), dim=-1)
    arguments = head.domain_map(*raw)

    def run() -> Tensor:
        # Its negative binomial scales its arguments in place.
        copies = tuple(argument.clone() for argument in arguments)
        return head.distribution(copies, loc=parameters.loc, scale=parameters.scale).icdf(LEVELS)

    return run


def time_rounds(runs: Dict[str, Callable[[], Any]], rounds: int) -> Dict[str, List[float]]:
    """Seconds of each run, taken in turn; the first round warms up and does not count."""
    seconds: Dict[str, List[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def measure(name: str, arguments: argparse.Namespace) -> Dict[str, Any]:
    """Seconds of every run of one head, and its largest disagreement with scipy."""
    head = resolve_head(name)
    assert isinstance(head, Head)
    parameters = draw_parameters(head, arguments.seed)
    mapped = ParameterHead(head)(parameters.raw)

    def distribution() -> UnivariateDistribution:
        return head.distribution(mapped, loc=parameters.loc, scale=parameters.scale)

    runs: Dict[str, Callable[[], Any]] = {"moecast": lambda: distribution().icdf(LEVELS)}
    ours = as_array(distribution().icdf(LEVELS))
    theirs: Optional[np.ndarray] = None
    factor = 1.0
    expected = distribution()
    if is_mixture(expected):
        number = int(np.prod(SHAPE))
        elements = np.random.default_rng(arguments.seed).choice(
            number, arguments.sample, replace=False
        )
        search = RootSearch(expected, elements, arguments.cdfs == "stats")
        runs["scipy"], theirs = search, search()
        ours, factor = ours.reshape(len(DECILES), -1)[:, elements], number / arguments.sample
    else:
        direct = scipy_quantiles(expected)
        if direct is not None:
            levels = as_array(LEVELS)
            theirs = direct(levels)
            runs["scipy"] = lambda: scipy_quantiles(distribution())(levels)  # type: ignore[misc]
    if name in GLUONTS:
        runs["gluonts"] = gluonts_quantiles(name, parameters)
    seconds = time_rounds(runs, arguments.rounds)
    if "scipy" in seconds:
        seconds["scipy"] = [factor * value for value in seconds["scipy"]]
    difference = None
    if theirs is not None:
        difference = float((np.abs(ours - theirs) / (1 + np.abs(theirs))).max())
    return {"seconds": seconds, "sampled": factor != 1.0, "difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--heads", nargs="+", default=head_names(), help="all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=int, default=200, help="elements searched one by one")
    parser.add_argument("--cdfs", choices=["special", "stats"], default="special", help="of these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the raw figures here as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    number = int(np.prod(SHAPE))
    print(f"{describe_machine()}; medians of {arguments.rounds} rounds")
    print(
        f"* by a root search for each element with the cdfs of scipy.{arguments.cdfs}, timed on "
        f"{arguments.sample:,} of {number:,} elements and scaled up to all\n"
    )
    print("| head | moecast s | scipy s | ratio | gluonts s | ratio | difference |")
    print("|---" * 7 + "|", flush=True)
    results = {}
    for name in arguments.heads:
        result = results[name] = measure(name, arguments)
        seconds = {run: statistics.median(values) for run, values in result["seconds"].items()}
        cells = [f"{seconds['moecast']:.3f}"]
        for run in ("scipy", "gluonts"):
            mark = "*" if run == "scipy" and result["sampled"] else ""
            known = run in seconds
            cells.append(f"{seconds[run]:.3f}{mark}" if known else "–")
            cells.append(f"{seconds[run] / seconds['moecast']:.1f}×" if known else "–")
        difference = result["difference"]
        cells.append("–" if difference is None else f"{difference:.0e}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": describe_machine(), **results}, indent=1))


if __name__ == "__main__":
    main()
