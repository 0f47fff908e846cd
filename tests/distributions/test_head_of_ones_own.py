"""The head that docs/heads.md builds, as its reader would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from moecast.distributions import Head, ParameterHead, has_cdf, resolve_head, scaling_for
from scipy import stats

DOCS = Path(__file__).resolve().parents[2] / "docs" / "heads.md"


def logistic_head(**settings: str) -> Head:
    code = DOCS.read_text().split("```python")[-1].split("```")[0]
    namespace: dict = {}
    exec(code, namespace)
    return namespace["LogisticOutput"](**settings)


def test_it_is_the_logistic_distribution() -> None:
    loc, scale = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 3.0]).double()
    distribution = logistic_head().distribution((loc, scale))
    reference = stats.logistic(loc.numpy(), scale.numpy())
    values = torch.tensor([[-3.0], [0.0], [5.0]]).double()
    levels = torch.tensor([[0.1], [0.5], [0.99]]).double()
    np.testing.assert_allclose(distribution.log_prob(values), reference.logpdf(values), rtol=1e-9)
    np.testing.assert_allclose(distribution.cdf(values), reference.cdf(values), rtol=1e-9)
    np.testing.assert_allclose(distribution.icdf(levels), reference.ppf(levels), rtol=1e-9)
    np.testing.assert_allclose(distribution.variance, reference.var(), rtol=1e-9)


def test_sampling_scaling_and_both_losses_come_with_the_base() -> None:
    raw = torch.randn(5, 7, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = torch.zeros(5, 7)
    for loss in ("nll", "crps"):
        head = resolve_head(logistic_head(loss=loss))
        losses = head.loss(target, ParameterHead(head)(raw), loc=torch.ones(5, 1))
        (gradient,) = torch.autograd.grad(losses.sum(), raw)
        assert gradient.isfinite().all()
        assert gradient.any()
    assert has_cdf(head)
    assert scaling_for(head) == "std"
    assert head.distribution(ParameterHead(head)(raw)).sample((3,)).shape == (3, 5, 7)


def test_the_score_by_quadrature_is_the_closed_form() -> None:
    loc, scale = torch.zeros(1).double(), torch.ones(1).double()
    distribution = logistic_head().distribution((loc, scale))
    z = torch.tensor([-20.0, -1.0, 0.0, 2.5, 9.0]).double()
    closed = z - 2 * torch.nn.functional.logsigmoid(z) - 1
    torch.testing.assert_close(distribution.crps(z), closed, rtol=1e-5, atol=1e-6)
