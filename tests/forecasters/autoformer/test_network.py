"""The Autoformer's network: what its forecasts depend on, and how."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from model_cases import CONTEXT, FEATURES, HORIZON, autoformer, series, untrained
from moecast.distributions import PointOutput
from moecast.forecasters import lightning_module
from moecast.forecasters.autoformer import AutoformerNetwork
from moecast.forecasters.fields import FEAT_DYNAMIC_REAL
from moecast.forecasters.moe import balance_loss, total_balance_loss
from torch import Tensor

BATCH = 4
WAVELETS = {"wavelet": "db2", "decomposition": "layers"}
COVARIATES = {"num_feat_dynamic_real": 2, "num_past_feat_dynamic_real": 1}
# Values as they are, and distributions whose first raw parameter is their mean.
PLAIN = {"scaling": "none", "distr_output": "normal"}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"decomposition": None},
    "input": {"decomposition": "input"},
    "layers": {"decomposition": "layers"},
    "wavelets": {"wavelet": "db2"},
    "wavelets layers": {**WAVELETS, "num_encoder_layers": 2, "num_decoder_layers": 2},
}


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    return VARIANTS[request.param]


def network_of(**settings: Any) -> AutoformerNetwork:
    """In double precision, every weight random."""
    network = untrained(autoformer()(**settings)).network
    assert isinstance(network, AutoformerNetwork)
    return network.double()


def inputs_of(network: AutoformerNetwork, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        name: torch.randn(spec.shape, generator=generator, dtype=torch.float64)
        for name, spec in network.describe_inputs(BATCH).items()
    }
    inputs["past_target"] = inputs["past_target"].cumsum(dim=1)
    inputs["past_observed_values"] = torch.ones_like(inputs["past_observed_values"])
    if "feat_static_cat" in inputs:
        inputs["feat_static_cat"] = torch.arange(BATCH)[:, None] % torch.tensor([[3, 2]])
    return inputs


def arguments(network: AutoformerNetwork, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """The head's parameters ``[parameter, batch, horizon, channel]``."""
    with torch.no_grad():
        return torch.stack(network.outputs(inputs, **options).distr_args)


def quantiles(network: AutoformerNetwork, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = network.outputs(inputs)
    forecast = network.distr_output.distribution(output.distr_args, output.loc, output.scale)
    levels = torch.tensor([0.05, 0.5, 0.9], dtype=torch.float64)
    return forecast.icdf(levels.reshape(3, 1, 1, 1))


@pytest.mark.parametrize("head", ["student_t", "normal(loss=crps)"])
def test_forecasts_move_and_grow_with_the_history(variant: dict[str, Any], head: str) -> None:
    network = network_of(distr_output=head, **variant)
    inputs = inputs_of(network)
    expected = quantiles(network, inputs)
    assert expected.isfinite().all()
    inputs["past_target"] = 50.0 * inputs["past_target"] - 1000.0
    torch.testing.assert_close(quantiles(network, inputs), 50.0 * expected - 1000.0)


def test_forecasts_grow_with_the_level_of_counts(variant: dict[str, Any]) -> None:
    network = network_of(distr_output="negative_binomial", **variant)
    inputs = inputs_of(network)
    inputs["past_target"] = inputs["past_target"].abs().round() + 1.0
    before = arguments(network, inputs)
    inputs["past_target"] = 50.0 * inputs["past_target"]
    torch.testing.assert_close(arguments(network, inputs), before)


def test_the_horizons_targets_are_not_looked_at(variant: dict[str, Any]) -> None:
    network = network_of(**variant)
    inputs = inputs_of(network)
    expected = arguments(network, inputs)
    shape = (BATCH, HORIZON, 1)
    for number in (0.0, 1e6, math.nan):
        future = torch.full(shape, number, dtype=torch.float64)
        batch = {**inputs, "future_target": future, "future_observed_values": torch.ones(shape)}
        assert torch.equal(arguments(network, batch), expected)


def test_series_do_not_look_at_each_other(variant: dict[str, Any]) -> None:
    network = network_of(**variant, **FEATURES)
    inputs = inputs_of(network)
    together = arguments(network, inputs)
    for i in range(BATCH):
        alone = {name: tensor[i : i + 1] for name, tensor in inputs.items()}
        torch.testing.assert_close(together[:, i : i + 1], arguments(network, alone))


# What all tokens have in common is trend, and an encoder's trends go nowhere.
IN_DECOMPOSED_LAYERS = (
    r"encoder\.stacks\..*\.self_correlation\.output\.bias",
    r"encoder\.stacks\..*\.norms\.0\.bias",
)


@pytest.mark.parametrize(
    "settings",
    [
        {"decomposition": None},
        {"patch_size": [1, 3]},
        {**WAVELETS, "num_experts": 3},
        {**WAVELETS, "num_experts": 3, "top_k": 2, "target_dim": 2, "num_decoder_layers": 2},
        {"num_experts": 1, "wavelet": "haar"},
    ],
)
def test_gradients_reach_every_parameter_that_can_matter(settings: dict[str, Any]) -> None:
    network = network_of(**settings, **FEATURES).train()
    for seed in range(3):
        inputs = inputs_of(network, seed)
        target = torch.randn(BATCH, HORIZON, settings.get("target_dim", 1), dtype=torch.float64)
        for size in network.patch_sizes:
            output = network.outputs(inputs, size)
            balance = total_balance_loss(output.routings)
            losses = network.loss(output, target, torch.ones_like(target))
            (losses.sum() + balance).backward()
    without = IN_DECOMPOSED_LAYERS if "layers" in settings.values() else ()
    idle = [
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is None or parameter.grad.abs().max() < 1e-9
        if not any(re.fullmatch(pattern, name) for pattern in without)
    ]
    assert idle == []


def test_the_likelihood_alone_teaches_the_routers() -> None:
    """A choice weighs its score, so that it has a gradient also where it is a single one."""
    network = network_of(**WAVELETS, num_experts=3)
    inputs = inputs_of(network)
    target = torch.randn(BATCH, HORIZON, 1, dtype=torch.float64)
    network.loss(network.outputs(inputs), target, torch.ones_like(target)).sum().backward()
    routers = {n: p for n, p in network.named_parameters() if ".router." in n}
    assert len(routers) == 4
    assert all(parameter.grad.abs().max() > 1e-9 for parameter in routers.values())


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"num_encoder_layers": 2}, ["encoder.0.0", "encoder.0.1", "decoder.0"]),
        (
            {"wavelet": "haar", "wavelet_levels": 2, "num_decoder_layers": 2},
            ["encoder.0.0", "encoder.1.0", "encoder.2.0", "decoder.0", "decoder.1"],
        ),
        ({"num_experts": 1}, []),
    ],
)
def test_every_layer_routes_under_its_own_name(settings: dict[str, Any], names: list[str]) -> None:
    network = network_of(**settings)
    with torch.no_grad():
        routings = network.outputs(inputs_of(network)).routings
    assert list(routings) == names
    tokens = {
        # A band of the coarsest level has a fourth of the tokens.
        **{name: CONTEXT // 2 for name in names if name.startswith("encoder")},
        **({"encoder.0.0": 2, "encoder.1.0": 2, "encoder.2.0": 4} if "wavelet" in settings else {}),
        **{name: (CONTEXT // 2 + HORIZON) // 2 for name in names if name.startswith("decoder")},
        # The last layer puts out what the forecast is made of.
        names[-1] if names else "": HORIZON // 2,
    }
    for name, routing in routings.items():
        assert routing.scores_TE.shape == (BATCH, tokens[name], 4)
        assert routing.is_sparse


@pytest.mark.parametrize("wavelet", [None, "haar"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_balance_loss_has_a_term_of_1_for_every_uniform_layer(
    top_k: int, wavelet: str | None
) -> None:
    network = network_of(
        wavelet=wavelet, num_encoder_layers=2, num_decoder_layers=2, top_k=top_k, num_experts=4
    )
    inputs = inputs_of(network)
    layers = 2 * (1 if wavelet is None else 3) + 2

    def balance() -> Tensor:
        with torch.no_grad():
            return total_balance_loss(network.outputs(inputs).routings)

    # Random routers are not balanced: all of them cost.
    assert balance() > layers + 1e-3
    routers = [m for m in network.modules() if type(m).__name__ == "LinearRouter"]
    assert len(routers) == layers
    for router in routers:
        with torch.no_grad():
            router.output.weight.zero_()
    assert balance().item() == pytest.approx(layers)


def test_no_layer_is_left_out_of_the_balance_loss() -> None:
    # No layer's tokens can be divided among five experts evenly, at which gradients are 0.
    network = network_of(**WAVELETS, num_experts=5)
    total_balance_loss(network.outputs(inputs_of(network)).routings).backward()
    routers = {n: p for n, p in network.named_parameters() if ".router." in n}
    assert len(routers) == 4
    assert all(p.grad is not None and p.grad.abs().max() > 1e-9 for p in routers.values())


def test_training_adds_the_balance_loss_and_prediction_does_not_compute_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = autoformer(aux_weight=0.25, dropout=0.0)().create_lightning_module()
    inputs = inputs_of(module.network.double())
    target = torch.randn(BATCH, HORIZON, 1, dtype=torch.float64)
    batch = {**inputs, "future_target": target, "future_observed_values": torch.ones_like(target)}
    losses, routings = module.network.window_losses(batch, 2)
    expected = losses.mean() + 0.25 * sum(balance_loss(routing) for routing in routings.values())
    with monkeypatch.context() as patch:
        patch.setattr(type(module), "trainer", NotTheLastBatch())
        torch.testing.assert_close(module.training_step(batch, 0), expected)

    predictor = autoformer()().train(series())

    def refuse(routings: object) -> Tensor:
        raise AssertionError("computed")

    monkeypatch.setattr(lightning_module, "total_balance_loss", refuse)
    assert len(list(predictor.predict(series()))) == len(series())


class NotTheLastBatch:
    is_last_batch = False


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_that_are_not_chosen_change_nothing(top_k: int) -> None:
    network = network_of(num_experts=3, top_k=top_k)
    inputs = inputs_of(network)
    with torch.no_grad():
        output = network.outputs(inputs)
        before = torch.stack(output.distr_args)
        layer = network.decoder.layers[0]
        ids = output.routings["decoder.0"].ids_TK
        for expert in range(3):
            kept = layer.feed_forward.experts.contract.clone()
            layer.feed_forward.experts.contract[expert] *= -1.0
            moved = (arguments(network, inputs) - before).abs().amax(dim=(0, 2, 3)) > 1e-9
            layer.feed_forward.experts.contract.copy_(kept)
            assert moved.tolist() == (ids == expert).any(dim=2).any(dim=1).tolist()


def influence(network: AutoformerNetwork, name: str, **options: Any) -> Tensor:
    """How much each number of an input moves forecasts ``[batch, time, feature]``."""
    inputs = inputs_of(network)
    inputs[name] = inputs[name].clone().requires_grad_()
    output = network.outputs(inputs, **options)
    # Not a sum, to which a season under a norm would contribute nothing.
    generator = torch.Generator().manual_seed(7)
    total = sum(
        (argument * torch.randn(argument.shape, generator=generator)).sum()
        for argument in output.distr_args
    )
    (gradient,) = torch.autograd.grad(total, inputs[name])
    return gradient.abs()


ODD: dict[str, dict[str, Any]] = {
    "patches that fill neither": {"patch_size": 3, "context_length": 16, "prediction_length": 4},
    "patches longer than the horizon": {"patch_size": 7},
    "one patch": {"patch_size": CONTEXT},
    "lead time": {"lead_time": 3, "patch_size": 2},
    "context shorter than the wavelets": {"context_length": 6, "wavelet_levels": 4},
    "one step of context": {"context_length": 1, "patch_size": 1},
    "label of one step": {"label_length": 1, "patch_size": 3},
    "label is the context": {"label_length": CONTEXT, "patch_size": 3},
    "channels": {"target_dim": 3},
    "top-2": {"top_k": 2},
    "one head": {"num_heads": 1},
    "long filters": {"wavelet": "db20"},
    "one step": {"prediction_length": 1},
}


# A single token is its own trend, of which decomposed layers leave nothing.
SINGLE_TOKEN = ("one patch", "one step of context")


@pytest.mark.parametrize(
    ("variant_name", "case"),
    [
        *(("input", case) for case in ODD),
        *(("wavelets layers", case) for case in ODD if case not in SINGLE_TOKEN),
    ],
)
def test_odd_sizes_forecast_every_step_from_every_step(variant_name: str, case: str) -> None:
    settings = {**VARIANTS[variant_name], **PLAIN, **COVARIATES, **ODD[case]}
    network = network_of(**settings)
    horizon = settings.get("prediction_length", HORIZON)
    context = settings.get("context_length", CONTEXT)
    channels = settings.get("target_dim", 1)
    shape = (2, BATCH, horizon, channels)
    means = arguments(network, inputs_of(network))
    assert means.shape == shape
    assert means.isfinite().all()
    # No step is forecast as another, and every number of the inputs has a say.
    flat = means[0].flatten(1)
    assert all(len(set(row.tolist())) == flat.shape[1] for row in flat)
    for name, steps in (
        ("past_target", context),
        ("past_feat_dynamic_real", context),
        (FEAT_DYNAMIC_REAL, context + settings.get("lead_time", 0) + horizon),
        ("time_feat", context + settings.get("lead_time", 0) + horizon),
    ):
        moved = influence(network, name)
        assert moved.shape[:2] == (BATCH, steps)
        assert (moved > 1e-12).all(), name


@pytest.mark.parametrize("case", SINGLE_TOKEN)
def test_a_context_of_one_token_is_no_error_in_decomposed_layers(case: str) -> None:
    network = network_of(**VARIANTS["wavelets layers"], **PLAIN, **ODD[case])
    assert arguments(network, inputs_of(network)).isfinite().all()
    assert (influence(network, "past_target") > 1e-12).all()


def test_lead_time_is_forecast_but_not_trained_on() -> None:
    """It lies between the context and the horizon, whose forecasts begin behind it."""
    network = network_of(lead_time=3, patch_size=2)
    inputs = inputs_of(network)
    target = torch.randn(BATCH, 3 + HORIZON, 1, dtype=torch.float64)
    target[:, :3] = torch.nan
    batch = {**inputs, "future_target": target, "future_observed_values": torch.ones_like(target)}
    losses, _ = network.window_losses(batch, 2)
    assert losses.isfinite().all()
    # The same weights, asked for all seven steps.
    longer = network_of(prediction_length=3 + HORIZON, patch_size=2)
    longer.load_state_dict(network.state_dict())
    all_steps = arguments(longer, inputs)
    torch.testing.assert_close(arguments(network, inputs), all_steps[:, :, 3:])


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        (FEAT_DYNAMIC_REAL, slice(CONTEXT, None)),
        (FEAT_DYNAMIC_REAL, slice(None, 2)),
        ("past_feat_dynamic_real", slice(None)),
        ("past_observed_values", slice(3, 4)),
        ("time_feat", slice(CONTEXT, None)),
        ("feat_static_real", slice(None)),
        ("feat_static_cat", slice(None)),
    ],
)
def test_every_input_matters(variant: dict[str, Any], name: str, steps: slice) -> None:
    # Unscaled, so that what was observed does not act by way of the scale.
    network = network_of(**variant, **FEATURES, **PLAIN)
    inputs = inputs_of(network)
    before = arguments(network, inputs)
    changed = inputs[name].clone()
    if name == "feat_static_cat":
        changed = (changed + 1) % torch.tensor([3, 2])
    else:
        changed[:, steps] = 1.0 - changed[:, steps]
    after = arguments(network, {**inputs, name: changed})
    assert (after - before).abs().amax(dim=(0, 2, 3)).min() > 1e-6


def test_static_features_are_added_to_every_token_of_encoder_and_decoder() -> None:
    network = network_of(**FEATURES)
    inputs = inputs_of(network)
    seen: list[Tensor] = []
    for part in (network.encoder, network.decoder):
        part.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    arguments(network, inputs)
    inputs["feat_static_real"] = inputs["feat_static_real"] + 1.0
    arguments(network, inputs)
    added = torch.cat([seen[2] - seen[0], seen[3] - seen[1]], dim=1)
    assert added.shape == (BATCH, (CONTEXT + CONTEXT // 2 + HORIZON) // 2, 8)
    torch.testing.assert_close(added, added[:1, :1].expand_as(added))
    assert added.abs().min() > 1e-6


def test_what_is_read_lies_where_it_belongs() -> None:
    """7 steps of context, a label of 4, 5 of future, in patches of 3."""
    network = network_of(
        context_length=7,
        label_length=4,
        prediction_length=3,
        lead_time=2,
        patch_size=3,
        decomposition=None,
        **COVARIATES,
    )
    inputs = inputs_of(network)
    steps = torch.arange(12.0, dtype=torch.float64)[None, :, None]
    inputs[FEAT_DYNAMIC_REAL] = steps.expand(BATCH, -1, 2)
    inputs["past_feat_dynamic_real"] = 100.0 + steps[:, :7].expand(BATCH, -1, 1)
    inputs["time_feat"] = 200.0 + steps.expand_as(inputs["time_feat"])
    inputs["past_observed_values"][:, 6] = 0.0
    scaled = 300.0 + steps[:, :7].expand(BATCH, -1, -1)
    read = network.read(inputs, scaled, 3)
    # Before the context its first step is repeated, behind the future its last.
    context = torch.tensor([0.0, 0, 0, 1, 2, 3, 4, 5, 6], dtype=torch.float64)
    future = torch.tensor([7.0, 8, 9, 10, 11, 11], dtype=torch.float64)
    seen = (context < 6).double()
    seen[:2] = 0.0
    columns = [300.0 + context, seen, context, context, 100.0 + context]
    assert torch.equal(read.encoder[1], torch.stack(columns, dim=1))
    assert torch.equal(read.encoder_time[1, :, 0], 200.0 + context)
    # Of the label's four steps, two whole patches; nothing is known of the future's target.
    label, nothing = context[3:], torch.zeros(6, dtype=torch.float64)
    known = torch.cat([label, future])
    target, observed = torch.cat([300.0 + label, nothing]), torch.cat([seen[3:], nothing])
    assert torch.equal(read.decoder[1], torch.stack([target, observed, known, known], dim=1))
    assert torch.equal(read.decoder_time[1, :, 0], 200.0 + known)
    assert read.trend.shape == (BATCH, 6, 1)
    assert not read.trend.any()


def test_the_decoder_reads_the_season_and_the_encoder_all() -> None:
    network = network_of(decomposition="input")
    inputs = inputs_of(network)
    scaled = inputs["past_target"]
    with torch.no_grad():
        read = network.read(inputs, scaled, 2)
        seasonal, _ = network.decomposition(scaled)
    assert torch.equal(read.encoder[..., :1], scaled)
    assert torch.equal(read.decoder[:, : CONTEXT // 2, :1], seasonal[:, CONTEXT // 2 :])


def test_the_label_is_half_the_context_unless_it_is_given() -> None:
    assert autoformer()(context_length=9).network_config.label_length == 4
    assert autoformer()(context_length=1, patch_size=1).network_config.label_length == 1
    assert autoformer()(label_length=5).network_config.label_length == 5


def bands_of(network: AutoformerNetwork, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The encoder's output, and what each resolution's stack says."""
    seen: list[Tensor] = []
    hooks = [
        stack[-1].register_forward_hook(lambda _, __, outputs: seen.append(outputs[0]))
        for stack in network.encoder.stacks
    ]
    with torch.no_grad():
        outputs = network.encoder(tokens, {})
    for hook in hooks:
        hook.remove()
    return outputs, seen


@pytest.mark.parametrize("band", [0, 1, 2, 3])
def test_every_band_is_encoded_and_read_by_the_finer_ones(band: int) -> None:
    network = network_of(wavelet="db2", wavelet_levels=3)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 16, 8, generator=generator, dtype=torch.float64)
    wavelets = network.encoder.wavelets
    parts = wavelets.decompose(tokens)
    assert len(parts) == len(network.encoder.stacks) == 4
    # The filters have single precision: what they give back is the sequence to seven digits.
    other = [torch.randn_like(part) if i == band else part for i, part in enumerate(parts)]
    before, stacks = bands_of(network, wavelets.rebuild(parts))
    after, moved_stacks = bands_of(network, wavelets.rebuild(other))
    assert before.shape == tokens.shape
    assert (after - before).abs().max() > 1e-2
    moved = [(a - b).abs().max().item() > 1e-4 for a, b in zip(stacks, moved_stacks)]
    assert moved == [i >= band for i in range(4)]


@pytest.mark.parametrize("tokens", [1, 3, 5, 8])
def test_tokens_that_do_not_split_are_preceded_by_the_first(tokens: int) -> None:
    network = network_of(wavelet="haar", wavelet_levels=2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, 8, generator=generator, dtype=torch.float64)
    missing = {1: 3, 3: 1, 5: 3, 8: 0}[tokens]
    whole = torch.cat([x[:, :1].expand(-1, missing, -1), x], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(network.encoder(x, {}), network.encoder(whole, {})[:, missing:])


def test_without_wavelets_there_is_one_resolution() -> None:
    assert len(network_of(wavelet=None, wavelet_levels=3).encoder.stacks) == 1
    assert len(network_of(wavelet="haar", wavelet_levels=1).encoder.stacks) == 2


def fresh(**settings: Any) -> AutoformerNetwork:
    """As training begins, but the decoder silent: only the data's trend is left."""
    torch.manual_seed(0)
    network = autoformer()(**settings).create_network().double().eval()
    assert isinstance(network, AutoformerNetwork)
    with torch.no_grad():
        for size in network.patch_sizes:
            for projection in network.projections[str(size)]:
                projection.weight.zero_()
                projection.bias.zero_()
    return network


def means_of(network: AutoformerNetwork, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = network.outputs(inputs)
    return network.distr_output.distribution(output.distr_args, output.loc, output.scale).mean


@pytest.mark.parametrize("head", ["normal", "student_t", "laplace"])
@pytest.mark.parametrize("decomposition", ["input", "layers"])
def test_a_network_begins_with_a_level_between_the_mean_and_the_end(
    decomposition: str, head: str
) -> None:
    network = fresh(decomposition=decomposition, distr_output=head, patch_size=3, lead_time=1)
    inputs = inputs_of(network)
    rise = torch.linspace(20.0, 50.0, CONTEXT, dtype=torch.float64)
    flat = torch.full_like(rise, 7.0)
    inputs["past_target"] = torch.stack([rise, rise.flip(0), flat, -rise])[..., None]
    means = means_of(network, inputs)
    for past, level in zip(inputs["past_target"], means):
        low, high = sorted([past.mean().item(), past[-1].item()])
        assert low - 1e-9 <= level.min() <= level.max() <= high + 1e-9
    torch.testing.assert_close(means[2], torch.full_like(means[2], 7.0))
    scaled, loc, scale = network.scaler(*past_of(inputs))
    _, trend = network.decomposition(scaled)
    expected = loc + scale * 0.5 * (trend.mean(dim=1, keepdim=True) + trend[:, -1:])
    torch.testing.assert_close(means, expected.expand_as(means))


def past_of(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return inputs["past_target"], inputs["past_observed_values"]


def test_the_trend_is_continued_by_a_map_of_its_own_steps() -> None:
    network = fresh(distr_output="student_t", patch_size=3, lead_time=1, target_dim=2)
    inputs = inputs_of(network)
    with torch.no_grad():
        network.continuation.copy_(torch.randn(network.continuation.shape))
        weights = network.continuation + 0.5 / CONTEXT
        weights[:, -1] += 0.5
        scaled, loc, scale = network.scaler(*past_of(inputs))
        # Patches of 3 would begin the trend earlier; those steps are not of the context.
        extended = torch.cat([scaled[:, :1].expand(-1, 2, -1), scaled], dim=1)
        trend = network.decomposition(extended)[1][:, 2:]
        future = torch.stack(
            [
                sum(weights[h, step] * trend[:, step] for step in range(CONTEXT))
                for h in range(1, 1 + HORIZON)
            ],
            dim=1,
        )
        torch.testing.assert_close(means_of(network, inputs), loc + scale * future)


@pytest.mark.parametrize("decomposition", ["input", None])
def test_the_trend_leaves_spread_and_shape_as_they_are(decomposition: str | None) -> None:
    network = fresh(decomposition=decomposition, distr_output="student_t")
    degrees, location, spread = arguments(network, inputs_of(network))
    assert (location.std() > 0.01) == (decomposition is not None)
    for argument in (degrees, spread):
        torch.testing.assert_close(argument, torch.full_like(argument, argument[0, 0, 0].item()))


def test_each_step_of_a_patch_and_each_channel_has_numbers_of_its_own() -> None:
    network = fresh(
        decomposition=None,
        distr_output="normal",
        target_dim=2,
        patch_size=3,
        prediction_length=7,
        lead_time=1,
    )
    (projection,) = network.projections["3"]
    # Parameter, step of the patch, channel.
    numbers = torch.arange(12.0, dtype=torch.float64).reshape(2, 3, 2)
    with torch.no_grad():
        projection.bias.copy_(numbers.flatten())
    location, deviation = arguments(network, inputs_of(network))
    # Three patches of the future's eight steps, the first of which is lead time.
    phases = [1, 2, 0, 1, 2, 0, 1]
    expected = torch.stack([numbers[0, phase] for phase in phases])
    torch.testing.assert_close(location, expected.expand_as(location))
    raw = torch.stack([numbers[1, phase] for phase in phases])
    torch.testing.assert_close(deviation, (1 + raw.exp()).log().expand_as(deviation))


def test_both_paths_of_decomposed_layers_are_added() -> None:
    network = network_of(**WAVELETS, **PLAIN)
    inputs = inputs_of(network)
    before = arguments(network, inputs)
    without = []
    for paths in ([0], [1], [0, 1]):
        silent = copy.deepcopy(network)
        (projections,) = silent.projections.values()
        with torch.no_grad():
            for path in paths:
                projections[path].weight.zero_()
                projections[path].bias.zero_()
            without.append(arguments(silent, inputs)[0])
    trend = without.pop()
    torch.testing.assert_close(before[0] - trend, sum(part - trend for part in without))
    assert all((part - before[0]).abs().max() > 1e-3 for part in without)


def test_point_forecasts_are_made(variant: dict[str, Any]) -> None:
    network = network_of(distr_output=PointOutput(), **variant)
    (points,) = arguments(network, inputs_of(network))
    assert points.shape == (BATCH, HORIZON, 1)
    assert points.std(dim=0).min() > 1e-4


def test_dropout_acts_in_training_only() -> None:
    network = network_of(dropout=0.5)
    inputs = inputs_of(network)
    assert torch.equal(arguments(network, inputs), arguments(network, inputs))
    network.train()
    assert not torch.equal(arguments(network, inputs), arguments(network, inputs))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_any_of_several_patch_sizes_forecasts(size: int) -> None:
    network = network_of(patch_size=[1, 3, 4])
    inputs = inputs_of(network)
    own = arguments(network, inputs, patch_size=size)
    assert own.shape == (3, BATCH, HORIZON, 1)
    others = [arguments(network, inputs, patch_size=other) for other in {1, 3, 4} - {size}]
    assert all((own - other).abs().max() > 1e-3 for other in others)
    first = arguments(network, inputs, patch_size=1)
    assert torch.equal(arguments(network, inputs), first)


def test_features_are_dropped_from_the_tokens_of_encoder_and_decoder() -> None:
    network = network_of(dropout=0.5).train()
    inputs = inputs_of(network)
    seen: list[Tensor] = []
    for part in (network.encoder, network.decoder):
        part.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    arguments(network, inputs)
    for tokens in seen:
        dropped = tokens == 0
        assert 0.2 < dropped[:, 0].float().mean() < 0.8
        assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))


def test_the_decoder_reads_the_encoder_on_the_axis_of_context_and_horizon() -> None:
    network = network_of(label_length=6, prediction_length=7, patch_size=2)
    seen: list[tuple[Any, ...]] = []
    (layer,) = network.decoder.layers
    layer.cross_correlation.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    arguments(network, inputs_of(network))
    ((query, memory, length),) = seen
    assert query.shape[1] == 3 + 4
    assert memory.shape[1] == CONTEXT // 2
    assert length == CONTEXT // 2 + 4


@pytest.mark.parametrize("variant_name", VARIANTS)
def test_half_precision_trains_and_forecasts(variant_name: str) -> None:
    """Fourier transforms know no bfloat16, whether the network is of it or computes in it."""
    network = network_of(**VARIANTS[variant_name]).float()
    inputs = {name: tensor.float() for name, tensor in inputs_of(network).items()}
    target = torch.zeros(BATCH, HORIZON, 1)
    with torch.autocast("cpu", torch.bfloat16):
        output = network.outputs(inputs)
        network.loss(output, target, torch.ones_like(target)).sum().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0
    half = network.bfloat16().outputs({name: x.bfloat16() for name, x in inputs.items()})
    assert all(argument.isfinite().all() for argument in half.distr_args)
