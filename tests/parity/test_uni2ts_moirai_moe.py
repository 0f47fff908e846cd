"""MOIRAI-MoE beside uni2ts's, from which the published weights come.

Every weight is random, and so are the centroids: equal results mean equal mathematics.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Iterable

import pytest
import torch
from moecast.distributions import parameters_from_published, resolve_head
from moecast.distributions.univariate import AffineDistribution
from moecast.forecasters import MoiraiMoEPredictor
from moecast.forecasters.fields import WindowConfig
from moecast.forecasters.moirai_moe import (
    MoiraiMoEConfig,
    MoiraiMoENetwork,
    network_from_uni2ts,
    network_to_uni2ts,
)
from torch import Tensor

uni2ts = pytest.importorskip(
    "uni2ts.model.moirai_moe", reason="needs uni2ts, to compare with: pip install uni2ts==2.0.0"
)
heads = pytest.importorskip("uni2ts.distribution")
_base = pytest.importorskip("uni2ts.distribution._base")

BATCH = 3
SAMPLES = 3
HEAD = resolve_head("moirai_mixture")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the windows that it is shown.

    Attributes
    ----------
    padded
        Steps before the start of the first, second, … series.
    """

    patch_sizes: tuple[int, ...] = (16,)
    patch_size: int = 16
    context: int = 64
    horizon: int = 40
    target_dim: int = 1
    known: int = 0
    past: int = 0
    missing: bool = False
    padded: tuple[int, ...] = (0, 0, 0)
    scaling: bool = True

    @property
    def window(self) -> WindowConfig:
        return WindowConfig(
            None,
            self.horizon,
            self.context,
            target_dim=self.target_dim,
            num_feat_dynamic_real=self.known,
            num_past_feat_dynamic_real=self.past,
        )

    @property
    def num_past(self) -> int:
        return self.context // self.patch_size

    @property
    def num_future(self) -> int:
        return -(-self.horizon // self.patch_size)


CASES = {
    "univariate": Case(),
    "multivariate": Case(target_dim=3),
    "known covariates": Case(known=2),
    "past covariates": Case(past=2),
    "multivariate with covariates": Case(target_dim=2, known=2, past=1),
    "missing values": Case(missing=True),
    "missing values, multivariate with covariates": Case(
        target_dim=2, known=1, past=1, missing=True
    ),
    "short series": Case(padded=(0, 16, 48)),
    "short series, starting within a patch": Case(padded=(0, 21, 63)),
    "short series, multivariate with covariates": Case(
        target_dim=2, known=1, past=2, padded=(16, 0, 48)
    ),
    "unscaled": Case(scaling=False),
    "smallest patches of three": Case(patch_sizes=(8, 16, 32), patch_size=8, horizon=20),
    "patches in between, multivariate": Case(patch_sizes=(8, 16, 32), target_dim=2),
    "largest patches of three": Case(patch_sizes=(8, 16, 32), patch_size=32, known=1),
    "sizes out of order": Case(patch_sizes=(32, 8), patch_size=8, target_dim=2, horizon=20),
    "one patch ahead": Case(horizon=11, target_dim=2, known=1),
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same model and windows on both sides."""

    case: Case
    module: Any
    network: MoiraiMoENetwork
    inputs: dict[str, Tensor]
    arguments: dict[str, Tensor]

    def forecast(self, num_samples: int = SAMPLES) -> Any:
        """uni2ts's, a Lightning module."""
        case = self.case
        return uni2ts.MoiraiMoEForecast(
            prediction_length=case.horizon,
            target_dim=case.target_dim,
            feat_dynamic_real_dim=case.known,
            past_feat_dynamic_real_dim=case.past,
            context_length=case.context,
            module=self.module,
            patch_size=case.patch_size,
            num_samples=num_samples,
        )

    def first_tokens(self) -> Tensor:
        """The last token of each variate of uni2ts's context, of which the first patch follows."""
        return torch.arange(self.case.target_dim) * self.case.num_past + self.case.num_past - 1

    def their_distribution(self) -> Any:
        """uni2ts's distribution of all tokens."""
        size = self.case.patch_size
        tokens = self.forecast()._convert(size, **self.arguments)
        with torch.no_grad():
            return self.module(*tokens, torch.full_like(tokens[3], size))

    def our_parameters(self) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Ours of the first patch, each ``[batch, patch, channel]``, location and scale."""
        size = self.case.patch_size
        with torch.no_grad():
            variates = self.network.variates(self.inputs, size)
            hidden, _, _ = self.network.encode(variates, self.inputs, size, last=1)
            return self.network.parameters_after(hidden, size), variates.loc, variates.scale


def random_module(case: Case, seed: int = 0) -> Any:
    """uni2ts's module, also its norms and centroids random."""
    torch.manual_seed(seed)
    components = [
        heads.StudentTOutput(),
        heads.NormalFixedScaleOutput(),
        heads.NegativeBinomialOutput(),
        heads.LogNormalOutput(),
    ]
    module = uni2ts.MoiraiMoEModule(
        distr_output=heads.MixtureOutput(components=components),
        d_model=128,
        d_ff=64,
        num_layers=2,
        patch_sizes=case.patch_sizes,
        max_seq_len=64,
        attn_dropout_p=0.0,
        dropout_p=0.0,
        scaling=case.scaling,
    )
    torch.nn.init.normal_(module.encoder.centroid)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return module.eval()


def windows(case: Case, seed: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same windows as our inputs and as uni2ts's arguments."""
    generator = torch.Generator().manual_seed(seed)

    def noise(steps: int, channels: int) -> Tensor:
        return torch.randn(BATCH, steps, channels, generator=generator)

    levels = torch.tensor([5.0, -40.0, 0.3])[:, None, None]
    target = 3 * levels.abs() * noise(case.context, case.target_dim) + levels
    observed = torch.ones_like(target, dtype=torch.bool)
    if case.missing:
        observed = torch.rand(observed.shape, generator=generator) > 0.2
        observed[0, 16:40] = False
        observed[1, -20:] = False
    before = torch.arange(case.context) < torch.tensor(case.padded).unsqueeze(-1)
    target[before] = 0.0
    observed[before] = False
    inputs = {"past_target": target, "past_observed_values": observed.float()}
    arguments = {"past_target": target, "past_observed_target": observed, "past_is_pad": before}
    if case.known:
        known = 2 * noise(case.context + case.horizon, case.known) + 1
        inputs["feat_dynamic_real"] = known.clone()
        inputs["feat_dynamic_real"][:, : case.context][before] = torch.nan
        arguments["feat_dynamic_real"] = known
        arguments["observed_feat_dynamic_real"] = torch.ones_like(known, dtype=torch.bool)
    if case.past:
        past = 7 * noise(case.context, case.past)
        inputs["past_feat_dynamic_real"] = past.clone()
        inputs["past_feat_dynamic_real"][before] = torch.nan
        arguments["past_feat_dynamic_real"] = past
        arguments["past_observed_feat_dynamic_real"] = torch.ones_like(past, dtype=torch.bool)
    return inputs, arguments


def pair_of(case: Case, decoding: str = "cached") -> Pair:
    module = random_module(case)
    network = network_from_uni2ts(module, case.window, case.patch_size, decoding)
    return Pair(case, module, network, *windows(case))


def their_parameters(distribution: Any, tokens: Tensor, size: int) -> tuple[Tensor, ...]:
    """The parameters of some of uni2ts's tokens, in our order, ``[…, token, step(, …)]``."""
    mixture = distribution.base_dist
    student_t, normal, counts, log_normal = mixture.components
    nested = {
        "weights_logits": mixture.weights.logits,
        "components": [
            {"df": student_t.df, "loc": student_t.loc, "scale": student_t.scale},
            {"loc": normal.loc},
            {"total_count": counts.total_count, "logits": counts.logits},
            {"loc": log_normal.loc, "scale": log_normal.scale},
        ],
    }
    batch_dims = distribution.loc.dim() - 2
    return tuple(
        argument.index_select(batch_dims, tokens).narrow(batch_dims + 1, 0, size)
        for argument in parameters_from_published(HEAD, nested)
    )


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return pair_of(CASES[request.param])


def test_parameters_of_the_first_patch_are_equal(pair: Pair) -> None:
    theirs = pair.their_distribution()
    tokens = pair.first_tokens()
    ours, loc, scale = pair.our_parameters()
    published = their_parameters(theirs, tokens, pair.case.patch_size)
    for name, our, their in zip(HEAD.args_dim, ours, published, strict=True):
        their = their.transpose(1, 2)
        if name == "weights_logits":  # uni2ts's are normalised, which changes no weight.
            our, their = our.log_softmax(dim=-1), their.log_softmax(dim=-1)
        assert our.std() > 1e-3, name
        torch.testing.assert_close(our, their, **TOLERANCE, msg=lambda text, name=name: name + text)
    for our, their in ((loc, theirs.loc), (scale, theirs.scale)):
        torch.testing.assert_close(our, their[:, tokens, :1].transpose(1, 2), **TOLERANCE)


def test_likelihoods_of_the_first_patch_are_equal(pair: Pair) -> None:
    """Of numbers near and far, and of whole ones, where the counts' density is the same."""
    theirs = pair.their_distribution()
    tokens, size = pair.first_tokens(), pair.case.patch_size
    parameters, loc, scale = pair.our_parameters()
    published = tuple(p.transpose(1, 2) for p in their_parameters(theirs, tokens, size))
    shape = (BATCH, size, pair.case.target_dim)
    scaled = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for values in (scaled, 10 * scaled, 0.001 * scaled, scaled.abs(), scaled.abs().ceil()):
        value = values * scale + loc
        everywhere = torch.zeros_like(theirs.base_dist.components[0].loc)
        everywhere[:, tokens, :size] = value.transpose(1, 2)
        expected = theirs.log_prob(everywhere)[:, tokens, :size].transpose(1, 2)
        assert expected.isfinite().all()
        # The narrow component, of deviation 0.001, makes much of the last digit of its mean.
        for distr_args, tolerance in ((published, 2e-5), (parameters, 2e-3)):
            ours = pair.network.distr_output.distribution(distr_args, loc, scale)
            torch.testing.assert_close(
                ours.log_prob(value), expected, rtol=tolerance, atol=tolerance
            )


def test_another_centroid_or_weight_gives_other_parameters() -> None:
    """What is compared above depends on them."""
    pair = pair_of(CASES["univariate"])
    before = pair.our_parameters()[0]
    for name in ("layers.0.router.centroids_EF", "layers.1.experts.expand", "norm.weight"):
        network = network_from_uni2ts(pair.module, pair.case.window, pair.case.patch_size)
        weights = network.state_dict()[name]
        weights.copy_(weights.roll(1, dims=0))
        changed = dataclasses.replace(pair, network=network).our_parameters()[0]
        assert (changed[1] - before[1]).abs().max() > 1e-3, name


class SharedDraws:
    """Inverse cdfs at the same levels, in place of both sides' random draws.

    uni2ts's distributions have no inverse cdf, so that ours reads it off their parameters.

    Parameters
    ----------
    case
        What is forecast.
    levels
        Of each patch ``[sample, batch, step, channel]``, between 0 and 1; or with batch before
        sample for our cached steps.
    """

    def __init__(self, case: Case, levels: Iterable[Tensor]) -> None:
        self.case = case
        self.levels = levels

    def of_ours(self) -> Any:
        """For ``AffineDistribution.sample``."""
        patches = iter(self.levels)

        def sample(distribution: AffineDistribution, sample_shape: Any = ()) -> Tensor:
            levels = next(patches)
            return distribution.icdf(levels.reshape(*sample_shape, *distribution.batch_shape))

        return sample

    def of_theirs(self, first_tokens: Tensor) -> Any:
        """For ``AffineTransformed.sample``."""
        case = self.case
        patches = iter(enumerate(self.levels))
        context = case.target_dim * case.num_past
        future = context + torch.arange(case.target_dim) * case.num_future

        def sample(distribution: Any, sample_shape: Any = ()) -> Tensor:
            step, levels = next(patches)
            tokens = first_tokens if step == 0 else future + step - 1
            head_parameters = their_parameters(distribution, tokens, case.patch_size)
            dims = distribution.loc.dim() - 2
            loc, scale = (
                t.index_select(dims, tokens)[..., :1]
                for t in (distribution.loc, distribution.scale)
            )
            values = HEAD.distribution(head_parameters, loc, scale).icdf(levels.transpose(-1, -2))
            shape = distribution.base_dist.components[0].loc.shape
            # What is drawn of other tokens, and beyond the patch, must not matter.
            drawn = torch.full((*sample_shape, *shape), 7.0)
            drawn[..., tokens, : case.patch_size] = values
            return drawn

        return sample


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name)
        for name, case in {
            "univariate": Case(),
            "multivariate": Case(target_dim=3),
            "multivariate with covariates": Case(target_dim=2, known=2, past=1),
            "missing values, known covariates": Case(known=1, missing=True),
            "short series, past covariates": Case(past=1, padded=(0, 16, 48)),
            "smallest patches of three": Case(
                patch_sizes=(8, 16, 32), patch_size=8, horizon=36, target_dim=2, known=1
            ),
            "unscaled": Case(scaling=False),
            "one patch ahead": Case(horizon=16, target_dim=2),
        }.items()
    ],
)
def test_reencoded_paths_are_equal_given_the_same_draws(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of(case, "reencode")
    generator = torch.Generator().manual_seed(3)
    shape = (case.num_future, SAMPLES, BATCH, case.patch_size, case.target_dim)
    levels = 0.02 + 0.96 * torch.rand(shape, generator=generator, dtype=torch.float64)
    draws = SharedDraws(case, levels)
    monkeypatch.setattr(AffineDistribution, "sample", draws.of_ours())
    monkeypatch.setattr(
        _base.AffineTransformed, "sample", draws.of_theirs(pair.first_tokens()), raising=False
    )
    with torch.no_grad():
        theirs = pair.forecast()(**pair.arguments)
        ours, _ = pair.network.sample_paths(pair.inputs, case.patch_size, SAMPLES)
    theirs = theirs.view(BATCH, SAMPLES, case.horizon, case.target_dim).transpose(0, 1)
    assert ours.shape == (SAMPLES, BATCH, case.horizon, case.target_dim)
    assert (ours.std(dim=0) > 0).float().mean() > 0.9
    deviation = theirs.std(dim=(0, 2), keepdim=True)
    torch.testing.assert_close(ours / deviation, theirs / deviation, rtol=1e-4, atol=1e-4)


def test_cached_paths_are_others_from_the_second_patch_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Because location and scale stay those of the context."""
    case = CASES["univariate"]
    shape = (case.num_future, SAMPLES, BATCH, case.patch_size, case.target_dim)
    levels = torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    paths = []
    for decoding, in_order in (
        ("cached", [levels[0], *levels[1:].transpose(1, 2)]),
        ("reencode", levels),
    ):
        pair = pair_of(case, decoding)
        monkeypatch.setattr(AffineDistribution, "sample", SharedDraws(case, in_order).of_ours())
        with torch.no_grad():
            paths.append(pair.network.sample_paths(pair.inputs, case.patch_size, SAMPLES)[0])
    cached, reencoded = paths
    first = slice(0, case.patch_size)
    torch.testing.assert_close(cached[:, :, first], reencoded[:, :, first])
    later = (cached - reencoded)[:, :, case.patch_size :]
    assert (later.abs().amax(dim=(0, 2)) > 1e-3).all()


def our_network(**settings: Any) -> MoiraiMoENetwork:
    """A network of ours, of uni2ts's architecture unless told otherwise, every number random."""
    torch.manual_seed(4)
    config = MoiraiMoEConfig(
        **{
            "window": Case().window,
            "distr_output": HEAD,
            "scaling": "regularised_std",
            "patch_sizes": (16,),
            "d_model": 128,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 2,
            "max_seq_len": 64,
            **settings,
        }
    )
    network = MoiraiMoENetwork(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def assert_same_weights(this: torch.nn.Module, that: torch.nn.Module) -> None:
    """Names, types and every bit."""
    ours, theirs = this.state_dict(), that.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


def test_our_weights_go_to_uni2ts_and_back_unchanged() -> None:
    network = our_network()
    module = network_to_uni2ts(network)
    assert module.encoder.centroid.dtype == torch.float64
    back = network_from_uni2ts(module, network.window)
    assert_same_weights(back, network)
    assert back.config.trained_patch_sizes == network.config.trained_patch_sizes


@pytest.mark.parametrize(
    "settings",
    [
        {"num_experts": 16},
        {"top_k": 1},
        {"num_heads": 4},
        {"covariates_ahead": True},
        {"scaling": "std"},
        {"patch_sizes": (8, 16)},
    ],
    ids=str,
)
def test_what_uni2ts_would_take_for_something_else_is_refused(settings: dict[str, Any]) -> None:
    """uni2ts ignores settings that it does not know, and weights that it finds or lacks."""
    with pytest.raises(ValueError, match=next(iter(settings)).replace("patch_sizes", "patches")):
        network_to_uni2ts(our_network(**settings))


@pytest.mark.parametrize("name", ["univariate", "smallest patches of three", "sizes out of order"])
def test_uni2ts_weights_come_to_us_and_back_unchanged(name: str) -> None:
    case = CASES[name]
    module = random_module(case)
    network = network_from_uni2ts(module, case.window, case.patch_size)
    back = network_to_uni2ts(network)
    assert_same_weights(back, module)
    assert tuple(back.patch_sizes) == tuple(module.patch_sizes)
    assert back.max_seq_len == module.max_seq_len


@pytest.fixture
def case() -> Case:
    return Case(patch_sizes=(8, 16), target_dim=2, known=1)


def test_a_folder_of_uni2ts_is_read(case: Case, tmp_path: Path) -> None:
    module = random_module(case)
    module.save_pretrained(tmp_path)
    predictor = MoiraiMoEPredictor.from_pretrained(
        tmp_path,
        prediction_length=case.horizon,
        context_length=case.context,
        patch_size=case.patch_size,
        target_dim=case.target_dim,
        num_feat_dynamic_real=case.known,
    )
    pair = Pair(case, module, predictor.network, *windows(case))
    assert_equal_parameters(pair)
    assert_same_weights(predictor.network, pair_of(case).network)


def test_uni2ts_reads_our_folder(case: Case, tmp_path: Path) -> None:
    written = MoiraiMoEPredictor(pair_of(case).network)
    written.save_pretrained(tmp_path)
    module = uni2ts.MoiraiMoEModule.from_pretrained(tmp_path).eval()
    assert_equal_parameters(Pair(case, module, written.network, *windows(case)))


def test_our_folder_is_written_as_uni2ts_writes_it(case: Case, tmp_path: Path) -> None:
    module = random_module(case)
    module.save_pretrained(tmp_path / "theirs")
    MoiraiMoEPredictor(pair_of(case).network).save_pretrained(tmp_path / "ours")
    ours, theirs = (
        json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    for name in set(ours) - {"distr_output"}:
        assert ours[name] == theirs[name], name


def assert_equal_parameters(pair: Pair) -> None:
    distribution = pair.their_distribution()
    theirs = their_parameters(distribution, pair.first_tokens(), pair.case.patch_size)
    for our, their in zip(pair.our_parameters()[0][1:], theirs[1:], strict=True):
        torch.testing.assert_close(our, their.transpose(1, 2), **TOLERANCE)
