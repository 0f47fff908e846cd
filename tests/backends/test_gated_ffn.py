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
from gated_ffn_cases import Problem, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from moecast.backends import Scoring, TorchBackend
from torch import Tensor

BACKEND = TorchBackend()


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


@pytest.mark.parametrize("learning", [False, True])
def test_compiled_is_the_same(learning: bool) -> None:
    """What torch.compile cuts out of it, run without a compiler of C++."""
    x, weights, ids, expand, contract = problem(9, 4, 2, by_output=True)
    expand.requires_grad_(learning)
    expected = BACKEND.gated_ffn(x, weights, ids, expand, contract)
    compiled = torch.compile(BACKEND.gated_ffn, backend="eager")
    found = compiled(x, weights, ids, expand, contract)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if learning:
        gradients = [torch.autograd.grad(y.sum(), [expand])[0] for y in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


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
    # More choices than one block of the sort.
    "many choices": {"tokens": 600, "experts": 17, "top_k": 1, "features": 5, "hidden": 4},
}

# With other tiles, several of which one program computes.
SPANNED = ["narrow", "weights by output", "many experts"]


def kernel_problem(name: str) -> Problem:
    """In single precision, and with as many outputs as features."""
    sizes = {"features": 16, "hidden": 24, **KERNEL_PROBLEMS[name]}
    return problem(**sizes, outputs=sizes["features"], dtype=torch.float32)


class Computed(NamedTuple):
    """What is computed of a problem, with and without gradients."""

    outputs: Tensor
    outputs_in_training: Tensor
    gradients: tuple[Tensor, ...]
    # By router: weights, numbers and scores.
    chosen: dict[str, tuple[Tensor, ...]]


def compute(given_: Problem, gated_ffn: Callable[..., Tensor], route: Callable) -> Computed:
    """Everything that the kernels do, by the functions given."""
    x, weights, ids, expand, contract = given_
    with torch.inference_mode():
        outputs = gated_ffn(*given_)
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, weights, expand, contract)]
    in_training = gated_ffn(inputs[0], inputs[1], ids, *inputs[2:])
    # Of another gradient for each output.
    slopes = torch.arange(1.0, 1 + in_training.numel(), device=x.device).cos()
    gradients = torch.autograd.grad(in_training, inputs, slopes.view_as(in_training))
    router, top_k = expand[:, :, 0].contiguous(), ids.shape[-1]
    chosen = {}
    if top_k < len(router):
        with torch.inference_mode():
            for by_distance in (False, True):
                for by_score in (False, True):
                    scoring = Scoring(router, by_distance, by_score)
                    chosen[f"{scoring.by_distance} {by_score}"] = route(x, scoring, top_k)
    return Computed(outputs, in_training.detach(), gradients, chosen)


def assert_computed(found: Computed, expected: Computed, tolerance: float = 1e-5) -> None:
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(found.outputs, expected.outputs, **close)
    torch.testing.assert_close(found.outputs_in_training, expected.outputs, **close)
    for one, other in zip(found.gradients, expected.gradients):
        torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=10 * tolerance)
        assert one.stride() == other.stride()
    assert found.chosen.keys() == expected.chosen.keys()
    for name, (weights, ids, scores) in found.chosen.items():
        assert torch.equal(ids, expected.chosen[name][1]), name
        torch.testing.assert_close(weights, expected.chosen[name][0], **close)
        torch.testing.assert_close(scores, expected.chosen[name][2], **close)


def on_the_processor(name: str) -> Computed:
    return compute(kernel_problem(name), BACKEND.gated_ffn, BACKEND._choose)


# Triton decides when it is imported whether to interpret: hence a process of its own.
INTERPRETER = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from moecast.backends import cuda
from triton.runtime import interpreter

# Its bounds of loops are arrays of one number, which NumPy 2.4 does not take for a number.
patch = interpreter._patch_lang_tensor
def patch_and_index(tensor):
    patch(tensor)
    tensor.__index__ = lambda self: int(self.handle.data.item())
interpreter._patch_lang_tensor = patch_and_index

from test_gated_ffn import KERNEL_PROBLEMS, SPANNED, compute, kernel_problem

def run(names):
    problems = {name: kernel_problem(name) for name in names}
    return {n: tuple(compute(p, cuda.gated_ffn, cuda.route)) for n, p in problems.items()}
results = {"as chosen": run(KERNEL_PROBLEMS)}
# Several pieces side by side by one program, as in large problems.
spanning = cuda.Tiles(
    cuda.Tile(32, 16, 16, 4, 3, 2), cuda.Tile(16, 16, 16, 4, 3, 3), cuda.Tile(16, 32, 16, 4, 3)
)
cuda.tiles_for = lambda *_: spanning
results["spanning"] = run(SPANNED)
torch.save(results, sys.argv[2])
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Computed]]:
    """What the kernels give for each problem, interpreted on the CPU, by tiles."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton, which comes with torch for CUDA, is not installed")
    results: Path = tmp_path_factory.mktemp("kernels") / "results.pt"
    process = subprocess.run(
        [sys.executable, "-c", INTERPRETER, str(Path(__file__).parent), str(results)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return {
        tiles: {name: Computed(*result) for name, result in computed.items()}
        for tiles, computed in torch.load(results).items()
    }


@pytest.mark.parametrize(
    ("tiles", "name"),
    [
        *(("as chosen", name) for name in KERNEL_PROBLEMS),
        *(("spanning", name) for name in SPANNED),
    ],
)
def test_interpreted_kernels_equal_the_processor(
    tiles: str, name: str, interpreted: dict[str, dict[str, Computed]]
) -> None:
    assert_computed(interpreted[tiles][name], on_the_processor(name))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@needs_cuda
@pytest.mark.parametrize("name", list(KERNEL_PROBLEMS))
def test_cuda_equals_the_processor(name: str) -> None:
    given_ = Problem(*(tensor.cuda() for tensor in kernel_problem(name)))
    found = compute(given_, BACKEND.gated_ffn, BACKEND._choose)
    expected = on_the_processor(name)
    assert_computed(to_cpu(found), expected)


def to_cpu(computed: Computed) -> Computed:
    return Computed(
        computed.outputs.cpu(),
        computed.outputs_in_training.cpu(),
        tuple(gradient.cpu() for gradient in computed.gradients),
        {name: tuple(part.cpu() for part in parts) for name, parts in computed.chosen.items()},
    )


@needs_cuda
@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.sampled_from([(1, 1, 1), (5, 2, 5), (5, 2, 2), (4, 4, 4), (6, 1, 1)]),
    st.integers(0, 2**16),
)
def test_cuda_equals_a_loop_over_tokens(
    tokens: int, experts: tuple[int, int, int], seed: int
) -> None:
    """By kernels in single precision, of which each width is compiled, and in double by torch."""
    num_experts, top_k, busy = experts
    given_ = problem(tokens, num_experts, top_k, 5, 7, 5, busy=busy, seed=seed)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        x, weights, ids, expand, contract = (tensor.cuda() for tensor in given_)
        x, weights, expand, contract = (t.to(dtype) for t in (x, weights, expand, contract))
        found = BACKEND.gated_ffn(x, weights, ids, expand, contract).double().cpu().numpy()
        np.testing.assert_allclose(found, by_loop(given_), rtol=tolerance, atol=tolerance)


# Of the three sizes that rows per expert choose between.
@needs_cuda
@pytest.mark.parametrize("tokens", [64, 1000, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_in_every_tile_size(tokens: int, dtype: torch.dtype) -> None:
    given_ = problem(tokens, 16, 2, 96, 160, 96, by_output=True, dtype=torch.float32, busy=13)
    expected = compute(given_, BACKEND.gated_ffn, BACKEND._choose)
    x, weights, ids, expand, contract = (tensor.cuda() for tensor in given_)
    parts = (x.to(dtype), weights.to(dtype), ids, expand.to(dtype), contract.to(dtype))
    found = to_cpu(compute(Problem(*parts), BACKEND.gated_ffn, BACKEND._choose))
    pairs = [
        (found.outputs, expected.outputs),
        (found.outputs_in_training, expected.outputs),
        *zip(found.gradients, expected.gradients),
    ]
    for one, other in pairs:
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@needs_cuda
@pytest.mark.parametrize("learning", [False, True])
def test_cuda_under_autocast_is_half_precision(learning: bool) -> None:
    x, weights, ids, expand, contract = (
        tensor.cuda() for tensor in problem(50, 4, 2, 16, 24, 16, dtype=torch.float32)
    )
    expand.requires_grad_(learning)
    with torch.autocast("cuda", torch.bfloat16):
        outputs = BACKEND.gated_ffn(x, weights, ids, expand, contract)
    assert outputs.dtype == torch.bfloat16
    exact = BACKEND.gated_ffn(x, weights, ids, expand, contract)
    torch.testing.assert_close(outputs.float(), exact, rtol=0.1, atol=0.05)
    if learning:
        outputs.float().square().sum().backward()
        assert expand.grad.dtype == torch.float32


@needs_cuda
def test_a_cuda_graph_takes_any_routing() -> None:
    """What was recorded with one routing is replayed with others."""
    given_ = problem(60, 8, 2, 32, 48, 32, by_output=True, dtype=torch.float32)
    x, _, _, expand, contract = (tensor.cuda() for tensor in given_)
    scoring = Scoring(expand[:, :, 0].contiguous(), by_distance=True, weighted_by_score=False)

    def run() -> Tensor:
        return BACKEND.routed_ffn(x, scoring, 2, expand, contract).y_TO

    with torch.inference_mode():
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = run()
        for seed in range(3):
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            torch.testing.assert_close(recorded, run(), rtol=0, atol=0)


@needs_cuda
def test_nothing_waits_for_the_device() -> None:
    given_ = problem(60, 8, 2, 32, 48, 32, by_output=True, dtype=torch.float32)
    x, weights, ids, expand, contract = (tensor.cuda() for tensor in given_)
    expand.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        BACKEND.gated_ffn(x, weights, ids, expand, contract).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("learning", [False, True])
def test_compiled_is_the_same_on_cuda(learning: bool) -> None:
    given_ = problem(60, 8, 2, 32, 48, 32, by_output=True, dtype=torch.float32)
    x, weights, ids, expand, contract = (tensor.cuda() for tensor in given_)
    expand.requires_grad_(learning)
    expected = BACKEND.gated_ffn(x, weights, ids, expand, contract)
    found = torch.compile(BACKEND.gated_ffn)(x, weights, ids, expand, contract)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if learning:
        (gradient,) = torch.autograd.grad(found.sum(), [expand])
        (expected_gradient,) = torch.autograd.grad(expected.sum(), [expand])
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)
