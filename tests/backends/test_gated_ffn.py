"""Gated experts: torch against a loop over tokens, Triton's kernels against torch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moecast.backends import TorchBackend
from moecast.backends.torch import _padded_linear, grouped_linear
from torch import Tensor

BACKEND = TorchBackend()


class Problem(NamedTuple):
    """The arguments of ``gated_ffn``, in order."""

    x: Tensor
    weights: Tensor
    ids: Tensor
    expand: Tensor
    contract: Tensor


def problem(
    tokens: int,
    experts: int,
    top_k: int,
    features: int = 3,
    hidden: int = 4,
    outputs: int = 2,
    *,
    busy: int | None = None,
    by_output: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Random experts and routing, of which only ``busy`` experts are ever chosen.

    ``by_output`` stores weights as ``GatedExperts`` does, the inputs of an output side by side.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    chosen_from = torch.randperm(experts, generator=generator)[: busy or experts]
    order = torch.rand(tokens, len(chosen_from), generator=generator).argsort(dim=-1)
    weights = [
        normal(experts, features, 2 * hidden) / features**0.5,
        normal(experts, hidden, outputs) / hidden**0.5,
    ]
    if by_output:
        weights = [weight.mT.contiguous().mT for weight in weights]
    return Problem(
        normal(tokens, features),
        normal(tokens, top_k).softmax(dim=-1),
        chosen_from[order[:, :top_k]],
        *weights,
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Some with a single token, some with experts that nobody chose."""
    experts = draw(st.integers(1, 6))
    busy = draw(st.integers(1, experts))
    sizes = (draw(st.integers(1, 5)) for _ in range(3))
    tokens, top_k = draw(st.integers(1, 20)), draw(st.integers(1, busy))
    seed, by_output = draw(st.integers(0, 2**16)), draw(st.booleans())
    return problem(tokens, experts, top_k, *sizes, busy=busy, by_output=by_output, seed=seed)


def by_loop(given_: Problem) -> np.ndarray:
    """Token by token, expert by expert."""
    x, weights, ids, expand, contract = (tensor.numpy() for tensor in given_)
    result = np.zeros((len(x), contract.shape[-1]))
    for token in range(len(x)):
        for weight, expert in zip(weights[token], ids[token]):
            gate, up = np.split(x[token] @ expand[expert], 2)
            result[token] += weight * ((gate / (1 + np.exp(-gate)) * up) @ contract[expert])
    return result


@settings(deadline=None, max_examples=80)
@given(problems(), st.booleans())
def test_gated_ffn_equals_a_loop_over_tokens(given_: Problem, learning: bool) -> None:
    with torch.set_grad_enabled(learning):
        outputs = BACKEND.gated_ffn(*given_)
    np.testing.assert_allclose(outputs.numpy(), by_loop(given_), rtol=0, atol=1e-12)


@pytest.mark.parametrize("learning", [False, True])
def test_no_tokens_have_no_outputs(learning: bool) -> None:
    with torch.set_grad_enabled(learning):
        assert BACKEND.gated_ffn(*problem(0, experts=3, top_k=2)).shape == (0, 2)


def padded(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return _padded_linear(x, weight, counts, int(counts.max()))


@pytest.mark.parametrize("linear", [grouped_linear, padded])
@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_groups_are_multiplied_by_their_own_matrix(
    linear: Callable[[Tensor, Tensor, Tensor], Tensor],
    counts: list[int],
    features: int,
    learning: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), features, generator=generator, dtype=torch.float64)
    weight = torch.randn(len(counts), features, 2, generator=generator, dtype=torch.float64)
    with torch.set_grad_enabled(learning):
        outputs = linear(x, weight, torch.tensor(counts))
    row = 0
    for expert, count in enumerate(counts):
        for _ in range(count):
            expected = x[row].numpy() @ weight[expert].numpy()
            np.testing.assert_allclose(outputs[row].numpy(), expected, rtol=0, atol=1e-12)
            row += 1
    assert row == len(outputs)


@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 2), (5, 2)])
def test_gradients_are_those_of_finite_differences(
    tokens: int, top_k: int, by_output: bool
) -> None:
    x, weights, ids, expand, contract = problem(tokens, 4, top_k, busy=3, by_output=by_output)
    inputs = [tensor.requires_grad_() for tensor in (x, weights, expand, contract)]

    def outputs(x: Tensor, weights: Tensor, expand: Tensor, contract: Tensor) -> Tensor:
        return BACKEND.gated_ffn(x, weights, ids, expand, contract)

    assert torch.autograd.gradcheck(outputs, inputs)
    idle = sorted({0, 1, 2, 3} - set(ids.flatten().tolist()))
    assert idle
    gradients = torch.autograd.grad(outputs(*inputs).square().sum(), inputs)
    for gradient in gradients[2:]:
        assert (gradient[idle] == 0).all()
        assert all(gradient[expert].any() for expert in set(ids.flatten().tolist()))


# Fewer rows for every expert than are taken as columns, some as many, and more.
@pytest.mark.parametrize("tokens", [3, 40, 500])
def test_few_and_many_rows_have_the_outputs_and_gradients_of_a_sum_over_all_experts(
    tokens: int,
) -> None:
    x, weights, ids, expand, contract = problem(tokens, 6, 2, 7, 10, 5, busy=5, by_output=True)
    inputs = [tensor.requires_grad_() for tensor in (x, weights, expand, contract)]
    gate, up = torch.einsum("ti,eif->tef", x, expand).chunk(2, dim=-1)
    outputs = torch.einsum("teh,eho->teo", torch.nn.functional.silu(gate) * up, contract)
    chosen = outputs.gather(1, ids.unsqueeze(-1).expand(-1, -1, outputs.shape[-1]))
    expected = (weights.unsqueeze(-1) * chosen).sum(dim=1)
    found = BACKEND.gated_ffn(x, weights, ids, expand, contract)
    exact = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(found, expected, **exact)
    with torch.no_grad():
        torch.testing.assert_close(
            BACKEND.gated_ffn(x, weights, ids, expand, contract), expected, **exact
        )
    gradient = torch.cos(torch.arange(found.numel(), dtype=x.dtype)).view_as(found)
    for given_, gradient_found, gradient_expected in zip(
        inputs,
        torch.autograd.grad(found, inputs, gradient),
        torch.autograd.grad(expected, inputs, gradient),
    ):
        torch.testing.assert_close(gradient_found, gradient_expected, rtol=1e-12, atol=1e-12)
        assert gradient_found.stride() == given_.stride()


@pytest.mark.parametrize("by_output", [False, True])
def test_gradients_in_huge_pages_are_the_same(
    by_output: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weights, ids, *stacks = problem(9, 5, 2, 8, 12, 8, busy=4, by_output=by_output)
    stacks = [stack.requires_grad_() for stack in stacks]

    def gradients() -> list[Tensor]:
        for stack in stacks:
            stack.grad = None
        BACKEND.gated_ffn(x, weights, ids, *stacks).square().sum().backward()
        return [stack.grad for stack in stacks]

    expected = gradients()
    monkeypatch.setattr("moecast.backends.torch._LARGEST_KEPT", 0)
    for stack, found, small in zip(stacks, gradients(), expected):
        torch.testing.assert_close(found, small, rtol=0, atol=0)
        assert found.stride() == stack.stride()
        torch.testing.assert_close(found.add_(1), small + 1)


def test_gradients_that_nobody_asks_for_are_not_needed() -> None:
    x, weights, ids, expand, contract = problem(6, 4, 2)
    both = BACKEND.gated_ffn(x, weights, ids, expand.requires_grad_(), contract.requires_grad_())
    expected = torch.autograd.grad(both.sum(), [expand, contract])
    one = BACKEND.gated_ffn(x, weights, ids, expand.detach(), contract)
    (found,) = torch.autograd.grad(one.sum(), [contract])
    torch.testing.assert_close(found, expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("learning", [False, True])
def test_under_autocast_products_and_gradients_are_those_of_half_precision(learning: bool) -> None:
    x, weights, ids, expand, contract = problem(9, 4, 2, 16, 24, 16, dtype=torch.float32)
    expand.requires_grad_(learning)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = BACKEND.gated_ffn(x, weights, ids, expand, contract)
    assert outputs.dtype == torch.bfloat16
    expected = by_loop(Problem(x, weights, ids, expand.detach(), contract))
    np.testing.assert_allclose(outputs.detach().float().numpy(), expected, rtol=0.1, atol=0.05)
    if learning:
        (gradient,) = torch.autograd.grad(outputs.float().square().sum(), [expand])
        exact = BACKEND.gated_ffn(x, weights, ids, expand, contract)
        (expected_gradient,) = torch.autograd.grad(exact.square().sum(), [expand])
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected_gradient, rtol=0.1, atol=0.1)


@settings(deadline=None, max_examples=40)
@given(problems(), st.integers(0, 2**16))
def test_neither_the_order_of_tokens_nor_the_numbers_of_experts_matter(
    given_: Problem, seed: int
) -> None:
    x, weights, ids, expand, contract = given_
    expected = BACKEND.gated_ffn(*given_)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(len(x), generator=generator)
    experts = torch.randperm(len(expand), generator=generator)
    places = torch.randperm(ids.shape[-1], generator=generator)
    exact = {"rtol": 0, "atol": 1e-12}
    permuted = BACKEND.gated_ffn(x[tokens], weights[tokens], ids[tokens], expand, contract)
    torch.testing.assert_close(permuted, expected[tokens], **exact)
    renumbered = BACKEND.gated_ffn(
        x, weights, experts.argsort()[ids], expand[experts], contract[experts]
    )
    torch.testing.assert_close(renumbered, expected, **exact)
    reordered = BACKEND.gated_ffn(x, weights[:, places], ids[:, places], expand, contract)
    torch.testing.assert_close(reordered, expected, **exact)


def test_a_trace_takes_any_routing() -> None:
    """The example's experts are one and the same; those of the others are spread, or all idle."""
    x, weights, _, expand, contract = problem(6, 5, 1)
    example = torch.full((6, 1), 3)
    with torch.no_grad():
        traced = torch.jit.trace(BACKEND.gated_ffn, (x, weights, example, expand, contract))
        for ids in (example, torch.tensor([[0], [4], [2], [0], [1], [3]]), torch.full((6, 1), 0)):
            given_ = Problem(2 * x - 1, weights, ids, expand, contract)
            np.testing.assert_allclose(traced(*given_).numpy(), by_loop(given_), rtol=0, atol=1e-12)


# Tiles have 32 rows and 64 columns, and sums are taken 32 numbers at a time: some sizes fill them,
# some do not, and three experts, or five, are no power of two.
KERNEL_PROBLEMS = {
    "one token": {"tokens": 1, "experts": 5, "top_k": 2},
    "one expert": {"tokens": 33, "experts": 1, "top_k": 1},
    "all experts": {"tokens": 9, "experts": 3, "top_k": 3},
    "whole tiles": {"tokens": 64, "experts": 2, "top_k": 1, "features": 64, "hidden": 64},
    "idle experts": {
        "tokens": 75,
        "experts": 5,
        "top_k": 2,
        "features": 40,
        "hidden": 70,
        "busy": 2,
    },
    "narrow": {"tokens": 70, "experts": 4, "top_k": 1, "features": 4, "hidden": 3},
    "weights by output": {"tokens": 50, "experts": 4, "top_k": 2, "by_output": True},
    "many experts": {"tokens": 40, "experts": 32, "top_k": 2, "features": 33, "hidden": 20},
}


def kernel_problem(name: str) -> Problem:
    """In single precision, and with as many outputs as features."""
    sizes = {"features": 16, "hidden": 24, **KERNEL_PROBLEMS[name]}
    return problem(**sizes, outputs=sizes["features"], dtype=torch.float32)


# Triton decides when it is imported whether to interpret: hence a process of its own.
INTERPRETER = """
import sys
import torch
from moecast.backends import cuda

problems = torch.load(sys.argv[1])
with torch.inference_mode():
    torch.save({name: cuda.gated_ffn(*given) for name, given in problems.items()}, sys.argv[2])
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the kernels give for each problem, interpreted on the CPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton, which comes with torch for CUDA, is not installed")
    folder: Path = tmp_path_factory.mktemp("kernels")
    torch.save({name: tuple(kernel_problem(name)) for name in KERNEL_PROBLEMS}, folder / "given.pt")
    process = subprocess.run(
        [sys.executable, "-c", INTERPRETER, str(folder / "given.pt"), str(folder / "result.pt")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return torch.load(folder / "result.pt")


@pytest.mark.parametrize("name", list(KERNEL_PROBLEMS))
def test_interpreted_kernels_equal_the_torch_backend(
    name: str, interpreted: dict[str, Tensor]
) -> None:
    expected = BACKEND.gated_ffn(*kernel_problem(name))
    torch.testing.assert_close(interpreted[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("learning", [False, True], ids=["kernels", "grouped products"])
@pytest.mark.parametrize("name", list(KERNEL_PROBLEMS))
def test_cuda_equals_the_cpu(name: str, learning: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_to_be_called(*_: object) -> None:
        raise AssertionError("without gradients, the kernels compute")

    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    if not learning:
        monkeypatch.setattr("moecast.backends.torch.grouped_linear", not_to_be_called)
    given_ = kernel_problem(name)
    with torch.set_grad_enabled(learning):
        outputs = BACKEND.gated_ffn(*(tensor.cuda() for tensor in given_))
    np.testing.assert_allclose(outputs.cpu().numpy(), by_loop(given_), rtol=1e-5, atol=1e-5)
