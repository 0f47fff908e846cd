"""The closed-form loss against the distribution that it does without."""

import pytest
import torch
from gluonts.torch.distributions import StudentTOutput as GluonTSStudentTOutput
from hypothesis import given
from hypothesis import strategies as st
from moecast.distributions import StudentTOutput
from scipy.stats import t as scipy_student_t

HEADS = StudentTOutput(), GluonTSStudentTOutput()


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)


@given(seed=st.integers(0, 1000), scaled=st.booleans())
def test_loss_and_gradients_are_those_of_the_distribution(seed: int, scaled: bool) -> None:
    raw = numbers(3, 4, 5, 1, seed=seed)
    target = numbers(4, 5, seed=seed + 1)
    loc, scale = (numbers(2, 4, 1, seed=seed + 2).exp()) if scaled else (None, None)
    results = []
    for head in HEADS:
        leaves = [part.clone().requires_grad_() for part in (*raw, target)]
        losses = head.loss(leaves[3], head.domain_map(*leaves[:3]), loc=loc, scale=scale)
        weights = numbers(4, 5, seed=seed + 3)
        results.append((losses, *torch.autograd.grad((losses * weights).sum(), leaves)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("df", [2.1, 5.0, 300.0])
def test_loss_is_the_negative_log_density(df: float) -> None:
    values = torch.linspace(-50, 50, 101, dtype=torch.float64)
    args = tuple(torch.tensor([df, 1.5, 0.3], dtype=torch.float64))
    expected = -scipy_student_t(df, 1.5, 0.3).logpdf(values.numpy())
    torch.testing.assert_close(
        StudentTOutput().loss(values, args), torch.from_numpy(expected), rtol=1e-9, atol=1e-9
    )


def test_gradients_are_finite_in_the_tails() -> None:
    raw = [torch.full((3, 1), 0.0, requires_grad=True) for _ in range(3)]
    target = torch.tensor([-1e6, 0.0, 1e6])
    head = StudentTOutput()
    head.loss(target, head.domain_map(*raw)).sum().backward()
    assert all(part.grad.isfinite().all() for part in raw)


def test_weighting_by_the_variance_is_kept() -> None:
    losses = [
        type(head)(beta=0.5).loss(numbers(4, 5), head.domain_map(*numbers(3, 4, 5, 1)))
        for head in HEADS
    ]
    torch.testing.assert_close(*losses)
