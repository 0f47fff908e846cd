"""The Autoformer's parts against their definitions, written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_cases import autoformer
from moecast.backends import get_backend
from moecast.forecasters.autoformer import AutoformerConfig
from moecast.forecasters.autoformer.layers import (
    AutoCorrelation,
    Layer,
    MixtureFeedForward,
    SequenceDropout,
    SeriesDecomposition,
)
from torch import Tensor

WIDTH = 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def randomised(module: Any) -> Any:
    """In double precision, every parameter random."""
    module = module.double()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(0.7 * normal(*parameter.shape, seed=100 + i))
    return module


def auto_correlation(num_heads: int = 2, delay_factor: float = 1.5) -> AutoCorrelation:
    return randomised(AutoCorrelation(WIDTH, num_heads, delay_factor))


def auto_correlation_by_loops(
    layer: AutoCorrelation, query: Tensor, memory: Tensor, length: int, kept: int
) -> Tensor:
    """Wu et al. (2021), equations 5 to 7, one series, head and delay after the other."""
    width = WIDTH // layer.num_heads
    outputs = torch.zeros(len(query), length, WIDTH, dtype=torch.float64)
    for series in range(len(query)):
        for head in range(layer.num_heads):
            rows = slice(head * width, (head + 1) * width)
            q, k, v = (torch.zeros(length, width, dtype=torch.float64) for _ in range(3))
            for target, linear, tokens in (
                (q, layer.query, query),
                (k, layer.key, memory),
                (v, layer.value, memory),
            ):
                target[: tokens.shape[1]] = linear(tokens[series])[:, rows]
            correlations = [
                sum((q[step] @ k[step - delay]).item() for step in range(length))
                / (length * math.sqrt(width))
                for delay in range(length)
            ]
            best = sorted(range(length), key=lambda delay: -correlations[delay])[:kept]
            sharpness = math.exp(layer.log_sharpness[head].item())
            weights = [math.exp(sharpness * correlations[delay]) for delay in best]
            for delay, weight in zip(best, weights):
                moved = torch.stack([v[step - delay] for step in range(length)])
                outputs[series, :, rows] += weight / sum(weights) * moved
    return outputs[:, : query.shape[1]] @ layer.output.weight.T + layer.output.bias


@pytest.mark.parametrize("num_heads", [1, 2, 6])
@pytest.mark.parametrize("length", [1, 2, 7, 12])
def test_auto_correlation_with_itself_is_a_sum_over_delays(length: int, num_heads: int) -> None:
    layer = auto_correlation(num_heads)
    x = normal(3, length, WIDTH)
    kept = {1: 1, 2: 2, 7: 2, 12: 3}[length]  # 1.5 times the logarithm, at least two
    with torch.no_grad():
        expected = auto_correlation_by_loops(layer, x, x, length, kept)
        torch.testing.assert_close(layer(x, x, length), expected)


@pytest.mark.parametrize(
    ("query_length", "memory_length", "length", "kept"), [(5, 8, 11, 3), (8, 3, 9, 3), (4, 4, 4, 2)]
)
def test_auto_correlation_with_a_memory_is_a_sum_over_delays(
    query_length: int, memory_length: int, length: int, kept: int
) -> None:
    layer = auto_correlation()
    query, memory = normal(2, query_length, WIDTH), normal(2, memory_length, WIDTH, seed=1)
    with torch.no_grad():
        expected = auto_correlation_by_loops(layer, query, memory, length, kept)
        torch.testing.assert_close(layer(query, memory, length), expected)


@pytest.mark.parametrize("later", [1, 3, 6])
def test_it_makes_no_difference_where_on_the_axis_the_query_begins(later: int) -> None:
    layer = auto_correlation()
    query, memory = normal(2, 5, WIDTH), normal(2, 8, WIDTH, seed=1)
    with torch.no_grad():
        first = layer(query, memory, 11)
        silence = torch.zeros(2, later, WIDTH, dtype=torch.float64)
        moved = layer(torch.cat([silence, query], dim=1), memory, 11)
    torch.testing.assert_close(moved[:, later:], first)


@pytest.mark.parametrize("period", [2, 3, 4])
def test_the_delays_kept_of_a_periodic_sequence_are_multiples_of_its_period(period: int) -> None:
    layer = auto_correlation(delay_factor=1.0)
    with torch.no_grad():
        # A query that is its key is most like it at delay 0, and so at every period.
        layer.key.load_state_dict(layer.query.state_dict())
        x = normal(3, period, WIDTH).repeat(1, 24 // period, 1)
        kept = delays_kept(layer, x)
        expected = layer.output(layer.value(x))
        torch.testing.assert_close(layer(x, x, 24), expected)
    assert kept.sum(dim=1).eq(3).all()  # ln 24 is 3.2
    multiples = torch.arange(24) % period == 0
    assert not kept[:, ~multiples].any()


def delays_kept(layer: AutoCorrelation, x: Tensor) -> Tensor:
    """Which delays have a weight ``[B, T, A]``."""
    width = (-1, WIDTH // layer.num_heads)
    query = layer.query(x).unflatten(-1, width)
    key = layer.key(x).unflatten(-1, width)
    weights = layer._weights_of_delays(layer.correlation(query, key))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones_like(weights[:, 0]))
    return weights > 0


@pytest.mark.parametrize(
    ("length", "delay_factor", "number"),
    [
        (1, 1.0, 1),
        (2, 1.0, 2),
        (8, 1.0, 2),
        (21, 1.0, 3),
        (100, 1.0, 4),
        (100, 2.0, 9),
        (100, 0.1, 2),
        (200, 1.0, 5),
        (5, 10.0, 5),
    ],
)
def test_the_number_of_delays_is_the_factor_times_the_logarithm(
    length: int, delay_factor: float, number: int
) -> None:
    layer = auto_correlation(delay_factor=delay_factor)
    with torch.no_grad():
        kept = delays_kept(layer, normal(2, length, WIDTH))
    assert kept.sum(dim=1).eq(number).all()


def test_the_correlation_does_not_depend_on_the_length() -> None:
    layer = auto_correlation()
    query, key = normal(2, 1, 5, 2, 3).unbind()
    once, twice = (
        layer.correlation(query, key),
        layer.correlation(query.repeat(1, 2, 1, 1), key.repeat(1, 2, 1, 1)),
    )
    torch.testing.assert_close(twice, once.repeat(1, 2, 1))


def test_a_sharp_auto_correlation_takes_the_best_delay_alone() -> None:
    layer = auto_correlation(num_heads=1)
    x = normal(1, 9, WIDTH)
    with torch.no_grad():
        layer.log_sharpness.fill_(12.0)
        value = layer.value(x)
        query = layer.query(x).unsqueeze(2)
        key = layer.key(x).unsqueeze(2)
        best = int(layer.correlation(query, key).argmax())
        expected = layer.output(value.roll(best, dims=1))
        torch.testing.assert_close(layer(x, x, 9), expected)


def test_auto_correlation_keeps_series_apart_and_every_parameter_learns() -> None:
    layer = auto_correlation()
    query, memory = normal(3, 5, WIDTH), normal(3, 8, WIDTH, seed=1)
    together = layer(query, memory, 11)
    for i in range(3):
        alone = layer(query[i : i + 1], memory[i : i + 1], 11)
        torch.testing.assert_close(together[i : i + 1], alone)
    together.square().sum().backward()
    assert all(parameter.grad.abs().max() > 1e-6 for parameter in layer.parameters())


def test_what_all_tokens_have_in_common_does_not_choose_delays() -> None:
    layer = auto_correlation()
    query, key = normal(2, 3, 9, 2, 3).unbind()
    with torch.no_grad():
        expected = layer._weights_of_delays(layer.correlation(query, key))
        for moved in (
            layer.correlation(query + normal(1, 1, 2, 3), key),
            layer.correlation(query, key + normal(1, 1, 2, 3)),
        ):
            torch.testing.assert_close(layer._weights_of_delays(moved), expected)


def decomposition(moving_average: int = 5, features: int = 2) -> SeriesDecomposition:
    return randomised(SeriesDecomposition(features, moving_average))


def trend_by_loops(layer: SeriesDecomposition, x: Tensor) -> Tensor:
    """A weighted average of the steps around each, whose weights the class describes."""
    half = len(layer.log_weights) // 2
    trend = torch.zeros_like(x)
    for i, series in enumerate(x):
        steps = range(len(series))
        changes = [(series[t + 1] - series[t]).abs() for t in steps[:-1]]
        change = torch.stack(changes).mean(dim=0) if changes else torch.zeros_like(series[0])
        reach = half / (1 + math.exp(-(layer.width(change)).item()))
        weights = [
            math.exp(layer.log_weights[half + offset].item())
            / (1 + math.exp(abs(offset) - reach - 1))
            for offset in range(-half, half + 1)
        ]
        for t in steps:
            for offset in range(-half, half + 1):
                inside = min(max(t + offset, 0), len(series) - 1)
                trend[i, t] += weights[half + offset] / sum(weights) * series[inside]
    return trend


@pytest.mark.parametrize("moving_average", [3, 5, 25])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_the_trend_is_a_weighted_average_of_neighbours(length: int, moving_average: int) -> None:
    layer = decomposition(moving_average)
    x = normal(3, length, 2).cumsum(dim=1)
    with torch.no_grad():
        remainder, trend = layer(x)
        torch.testing.assert_close(trend, trend_by_loops(layer, x))
    torch.testing.assert_close(remainder + trend, x)


def test_the_weights_of_an_average_are_positive_and_sum_to_1() -> None:
    layer = decomposition(7)
    with torch.no_grad():
        kernels = layer.kernels(3 * normal(4, 10, 2))
    assert kernels.shape == (4, 7)
    assert kernels.min() > 0
    torch.testing.assert_close(kernels.sum(dim=1), torch.ones(4, dtype=torch.float64))


def test_an_average_begins_symmetric_falling_off_and_equal_for_all() -> None:
    with torch.no_grad():
        kernels = SeriesDecomposition(2, 9).kernels(normal(3, 10, 2).float())
    torch.testing.assert_close(kernels, kernels.flip(1))
    torch.testing.assert_close(kernels[0], kernels[1])
    assert (kernels[0, 4:].diff() < 0).all()


def test_a_constant_is_its_trend_and_a_level_changes_the_trend_alone() -> None:
    layer = decomposition()
    constant = torch.full((2, 6, 2), 3.5, dtype=torch.float64)
    x = normal(2, 6, 2)
    with torch.no_grad():
        remainder, trend = layer(constant)
        torch.testing.assert_close(trend, constant)
        torch.testing.assert_close(remainder, torch.zeros_like(constant))
        (season, slow), (raised_season, raised_slow) = layer(x), layer(x + 100.0)
    torch.testing.assert_close(raised_season, season)
    torch.testing.assert_close(raised_slow, slow + 100.0)


def test_series_are_decomposed_by_themselves() -> None:
    layer = decomposition()
    x = normal(3, 8, 2) * torch.tensor([0.1, 1.0, 5.0])[:, None, None]
    with torch.no_grad():
        _, together = layer(x)
        alone = torch.cat([layer(one)[1] for one in x.split(1)])
    torch.testing.assert_close(together, alone)


def test_weights_and_width_of_an_average_learn() -> None:
    layer = SeriesDecomposition(2, 5).double()
    _, trend = layer(normal(3, 8, 2))
    trend.square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.abs().min() > 1e-6


def spread(kernels: Tensor) -> Tensor:
    """Mean distance from the step averaged."""
    half = kernels.shape[1] // 2
    return kernels @ torch.arange(-half, half + 1).abs().to(kernels.dtype)


def test_how_rough_a_series_is_decides_how_wide_it_is_averaged() -> None:
    layer = SeriesDecomposition(1, 25).double()
    x = torch.stack([torch.linspace(0, 1, 50), 3.0 * (-1.0) ** torch.arange(50)])[
        ..., None
    ].double()
    with torch.no_grad():
        for weight, rough_is_wider in ((1.0, True), (-1.0, False)):
            layer.width.weight.fill_(weight)
            smooth, rough = spread(layer.kernels(x)).tolist()
            assert (rough > smooth + 1) == rough_is_wider
            assert abs(rough - smooth) > 1


def test_an_average_can_be_as_wide_as_it_may_and_narrow() -> None:
    layer = SeriesDecomposition(1, 25).double()
    x = normal(1, 40, 1)
    with torch.no_grad():
        layer.width.bias.fill_(-30.0)
        narrow = layer.kernels(x)[0]
        layer.width.bias.fill_(30.0)
        wide = layer.kernels(x)[0]
    assert narrow[10:15].sum() > 0.85
    assert narrow[0] < 1e-4
    # Within reach the weights stay as they are, here equal.
    assert wide[0] > 0.6 * wide[12]
    assert wide[4:21].max() < 1.01 * wide[4:21].min()


def test_sequence_dropout_drops_features_of_whole_series() -> None:
    torch.manual_seed(0)
    dropout = SequenceDropout(0.25)
    x = 1.0 + torch.rand(40, 5, 60)
    outputs = dropout(x)
    dropped = outputs == 0
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert dropped[:, 0].float().mean().item() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(outputs[~dropped], x[~dropped] / 0.75)
    # Each series loses features of its own.
    assert not torch.equal(dropped[0], dropped[1])


def test_sequence_dropout_acts_in_training_only_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropout = SequenceDropout(0.5)
    x = torch.randn(2, 3, 4)
    mean = torch.stack([dropout(x) for _ in range(4000)]).mean(dim=0)
    torch.testing.assert_close(mean, x, rtol=0.1, atol=0.02)
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(SequenceDropout(0.0)(x), x)


def config_of(**settings: Any) -> AutoformerConfig:
    return autoformer()(**{"d_model": WIDTH, "dropout": 0.0, **settings}).network_config


PARTS = ("self_correlation", "cross_correlation", "feed_forward")


def silence(layer: Layer, *parts: str) -> None:
    """Let these add nothing beside their skip connections."""
    with torch.no_grad():
        for part in parts:
            if part == "feed_forward":
                layer.feed_forward.experts.contract.zero_()
            else:
                output = getattr(layer, part).output
                output.weight.zero_()
                output.bias.zero_()


@pytest.mark.parametrize("reads_memory", [False, True])
@pytest.mark.parametrize("decomposition", [None, "input", "layers"])
def test_a_layer_whose_parts_are_silent_keeps_or_splits_what_it_is_given(
    decomposition: str | None, reads_memory: bool
) -> None:
    config = config_of(decomposition=decomposition)
    layer = randomised(Layer(config, get_backend(), reads_memory))
    silence(layer, *(PARTS if reads_memory else ("self_correlation", "feed_forward")))
    x, memory = normal(2, 7, WIDTH), normal(2, 5, WIDTH, seed=1)
    with torch.no_grad():
        remainder, trend, routing = layer(x, memory, 9) if reads_memory else layer(x)
    assert routing is not None
    assert routing.ids_TK.shape == (2, 7, 1)
    if decomposition != "layers":
        assert trend is None
        torch.testing.assert_close(remainder, x)
    elif reads_memory:
        torch.testing.assert_close(remainder + trend, x)
        assert trend.abs().max() > 0.1
    else:
        # What an encoder takes out is gone.
        assert trend is None
        assert (remainder - x).abs().max() > 0.1


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_a_layer_adds_to_it(part: str) -> None:
    layer = randomised(Layer(config_of(decomposition=None), get_backend(), True))
    x, memory = normal(2, 7, WIDTH), normal(2, 5, WIDTH, seed=1)
    silence(layer, *(other for other in PARTS if other != part))
    with torch.no_grad():
        assert (layer(x, memory, 9)[0] - x).abs().max() > 1e-3


def test_what_a_layer_adds_is_dropped_by_features_of_whole_series() -> None:
    torch.manual_seed(0)
    layer = randomised(Layer(config_of(decomposition=None, dropout=0.5), get_backend(), False))
    silence(layer, "self_correlation")
    x = normal(5, 7, WIDTH)
    with torch.no_grad():
        same = layer(x)[0] == x
        assert (layer.eval()(x)[0] != x).all()
    assert 0.2 < same[:, 0].float().mean() < 0.8
    assert torch.equal(same, same[:, :1].expand_as(same))


@pytest.mark.parametrize("decomposition", ["input", "layers"])
def test_a_layer_of_which_the_end_is_read_puts_out_the_same_end(decomposition: str) -> None:
    layer = randomised(Layer(config_of(decomposition=decomposition), get_backend(), True))
    x, memory = normal(2, 9, WIDTH), normal(2, 6, WIDTH, seed=1)
    with torch.no_grad():
        whole, _, routing = layer(x, memory, 15)
        end, _, end_routing = layer(x, memory, 15, 4)
    torch.testing.assert_close(end[:, -4:], whole[:, -4:])
    read = 9 if decomposition == "layers" else 4
    assert end.shape[1] == read
    assert end_routing.ids_TK.shape[1] == read
    torch.testing.assert_close(end_routing.scores_TE, routing.scores_TE[:, -read:])


def test_one_expert_has_no_router_and_several_have() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, WIDTH)
    one = MixtureFeedForward(config_of(num_experts=1), get_backend())
    outputs, routing = one(x)
    assert routing is None
    torch.testing.assert_close(outputs, one.experts(x))
    several = MixtureFeedForward(config_of(num_experts=3, top_k=2), get_backend())
    outputs, routing = several(x)
    assert routing is not None
    assert routing.ids_TK.shape == (2, 3, 2)
    torch.testing.assert_close(outputs, several.experts(x, several.router(x)))
