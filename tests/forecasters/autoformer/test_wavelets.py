"""The wavelet transform against PyWavelets, and what its bands hold."""

from __future__ import annotations

import math
from typing import Iterator

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moecast.forecasters.autoformer.config import WAVELETS
from moecast.forecasters.autoformer.wavelets import WaveletTransform
from torch import Tensor


@pytest.fixture(autouse=True, scope="module")
def double() -> Iterator[None]:
    """Filters are buffers of the default type, which rounds them to 1e-7 when it is single."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def sequence(length: int, batch: int = 2, features: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, features, generator=generator)


@pytest.mark.filterwarnings("ignore:Level value of .* is too high")
@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["haar", "db2", "db4", "db20", "sym5", "coif3", "bior2.4", "rbio3.1"]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 2**16),
)
def test_bands_are_those_of_pywavelets(wavelet: str, levels: int, blocks: int, seed: int) -> None:
    """Also where the sequence is shorter than the filters, as most are at the coarsest level."""
    transform = WaveletTransform(wavelet, levels)
    assert transform.shortest == 2**levels
    x = sequence(blocks * transform.shortest, seed=seed)
    expected = pywt.wavedec(x.numpy(), wavelet, mode="periodization", level=levels, axis=1)
    bands = transform.decompose(x)
    assert len(bands) == len(expected) == levels + 1
    assert sum(band.shape[1] for band in bands) == x.shape[1]
    for ours, theirs in zip(bands, expected):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-10)


def error_of_rebuilding(wavelet: str, levels: int, x: Tensor) -> float:
    transform = WaveletTransform(wavelet, levels)
    rebuilt = transform.rebuild(transform.decompose(x))
    assert rebuilt.shape == x.shape
    return (rebuilt - x).abs().max().item()


@pytest.mark.parametrize(("levels", "length"), [(1, 2), (2, 12), (3, 64)])
def test_every_wavelet_that_is_offered_gives_the_sequence_back(levels: int, length: int) -> None:
    x = sequence(length)
    errors = {wavelet: error_of_rebuilding(wavelet, levels, x) for wavelet in WAVELETS}
    # PyWavelets prints some filters with ten digits only.
    assert {wavelet: error for wavelet, error in errors.items() if error > 1e-6} == {}


def test_the_only_wavelet_that_is_not_offered_does_not() -> None:
    assert {*WAVELETS, "dmey"} == set(pywt.wavelist(kind="discrete"))
    assert error_of_rebuilding("dmey", 1, sequence(64)) > 1e-6


@pytest.mark.parametrize("wavelet", ["haar", "db4", "sym8"])
def test_single_precision_loses_only_what_it_rounds(wavelet: str) -> None:
    transform = WaveletTransform(wavelet, 3).float()
    x = sequence(40).float()
    bands = transform.decompose(x)
    assert all(band.dtype == torch.float32 for band in bands)
    torch.testing.assert_close(transform.rebuild(bands), x, rtol=0, atol=1e-5)


def test_hand_computed_haar() -> None:
    x = torch.tensor([1.0, 3.0, 2.0, -2.0]).reshape(1, 4, 1)
    bands = [band.flatten().tolist() for band in WaveletTransform("haar", 2).decompose(x)]
    root = math.sqrt(2)
    # Sums of pairs are 4 and 0, differences (first less second) -2 and 4, all over the root.
    assert bands == [
        pytest.approx([2.0]),
        pytest.approx([2.0]),
        pytest.approx([-2 / root, 4 / root]),
    ]


def energies(x: Tensor, wavelet: str, levels: int) -> list[float]:
    """Each band's share of the sequence's energy."""
    bands = WaveletTransform(wavelet, levels).decompose(x.reshape(1, -1, 1))
    return [(band.square().sum() / x.square().sum()).item() for band in bands]


@pytest.mark.parametrize("wavelet", ["haar", "db4", "sym5", "coif2"])
def test_bands_go_from_slow_to_fast(wavelet: str) -> None:
    steps, levels = torch.arange(64), 3
    slow = energies(torch.sin(2 * math.pi * steps / 64), wavelet, levels)
    assert slow[0] > 0.9
    alternating = energies(1.0 - 2.0 * (steps % 2), wavelet, levels)
    assert alternating[-1] == pytest.approx(1.0)
    # Periods of 12, 6 and 3 steps lie in the middle of the details, the coarsest first.
    for band, period in ((1, 12), (2, 6), (3, 3)):
        shares = energies(torch.sin(2 * math.pi * steps / period), wavelet, levels)
        assert max(range(levels + 1), key=shares.__getitem__) == band
    for shares in (slow, alternating):
        assert sum(shares) == pytest.approx(1.0)


def test_series_and_features_are_transformed_by_themselves() -> None:
    transform = WaveletTransform("db4", 2)
    x = sequence(16)
    together = transform.decompose(x)
    for i in range(x.shape[0]):
        for j in range(x.shape[2]):
            alone = transform.decompose(x[i : i + 1, :, j : j + 1])
            for both, one in zip(together, alone):
                torch.testing.assert_close(both[i : i + 1, :, j : j + 1], one)
