"""The kernels in C for experts of a few rows, against torch's products."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gated_ffn_cases import Problem, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from moecast.backends import TorchBackend, cpu
from torch import Tensor

BACKEND = TorchBackend()

expected_here = (
    sys.platform == "linux"
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    and shutil.which(os.environ.get("CC", "cc")) is not None
    and os.environ.get("MOECAST_C_KERNELS") != "0"
)
pytestmark = pytest.mark.skipif(
    not expected_here, reason="the kernels in C want Linux, AVX2 and a C compiler"
)


def for_kernels(
    tokens: int,
    experts: int,
    top_k: int,
    sizes: tuple[int, int, int] = (48, 80, 32),
    busy: int | None = None,
    seed: int = 0,
) -> Problem:
    """In single precision, with weights by output."""
    return problem(
        *(tokens, experts, top_k, *sizes),
        busy=busy,
        by_output=True,
        seed=seed,
        dtype=torch.float32,
    )


def exact(given_: Problem) -> Tensor:
    """In double precision, which torch computes."""
    x, weights, ids, expand, contract = given_
    return BACKEND.gated_ffn(x.double(), weights.double(), ids, expand.double(), contract.double())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows the kernels computed, by call."""
    rows: list[int] = []
    kernels = cpu.gated_ffn

    def counted(x: Tensor, tokens: object, segments: list, *others: object) -> None:
        rows.append(sum(number for _, _, number in segments))
        kernels(x, tokens, segments, *others)

    monkeypatch.setattr(cpu, "gated_ffn", counted)
    return rows


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 150),
    st.sampled_from([(1, 1, 1), (2, 1, 1), (3, 3, 3), (6, 2, 2), (32, 2, 32)]),
    st.tuples(*[st.integers(1, 9).map(lambda blocks: 16 * blocks)] * 3),
    st.integers(0, 2**16),
)
def test_outputs_and_gradients_are_those_of_products(
    tokens: int, experts: tuple[int, int, int], sizes: tuple[int, int, int], seed: int
) -> None:
    number, top_k, busy = experts
    given_ = for_kernels(tokens, number, top_k, sizes, busy, seed)
    expected = exact(given_)
    np.testing.assert_allclose(BACKEND.gated_ffn(*given_), expected, rtol=1e-5, atol=1e-5)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, weights, ids, expand, contract = given_
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, weights, expand, contract)]
        outputs = BACKEND.gated_ffn(inputs[0], inputs[1], ids, *inputs[2:])
        slopes = torch.arange(outputs.numel(), dtype=dtype).cos().view_as(outputs)
        return torch.autograd.grad(outputs, inputs, slopes)

    for found, wanted in zip(gradients(torch.float32), gradients(torch.float64)):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_they_compile() -> None:
    assert cpu._kernels() is not None


@pytest.mark.parametrize("learning", [False, True])
def test_experts_of_few_and_of_many_rows_in_one_layer(calls: list[int], learning: bool) -> None:
    # Up to 64 rows for the kernels, 65 and more for products of columns, 160 for those of rows.
    counts = torch.tensor([5, 90, 60, 0, 160, 64, 65, 1, 30])
    tokens = int(counts.sum())
    x, weights, _, *stacks = for_kernels(tokens, len(counts), 1)
    ids = torch.arange(len(counts)).repeat_interleave(counts)
    ids = ids[torch.randperm(tokens, generator=torch.Generator().manual_seed(0))].unsqueeze(1)

    def computed(dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype, copy=True).requires_grad_(learning) for t in (x, weights, *stacks)]
        outputs = BACKEND.gated_ffn(inputs[0], inputs[1], ids, *inputs[2:])
        if not learning:
            return [outputs]
        slopes = torch.arange(outputs.numel(), dtype=dtype).cos().view_as(outputs)
        return [outputs.detach(), *torch.autograd.grad(outputs, inputs, slopes)]

    for found, expected in zip(computed(torch.float32), computed(torch.float64)):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert calls == [5 + 60 + 64 + 1 + 30]


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_which_experts_are_for_the_kernels(calls: list[int], tokens: int) -> None:
    BACKEND.gated_ffn(*for_kernels(tokens, 8, 2))
    assert calls == [2 * tokens]
    calls.clear()
    x, weights, ids, expand, contract = for_kernels(tokens, 8, 2)
    BACKEND.gated_ffn(*for_kernels(tokens, 8, 2, (48, 40, 32)))
    BACKEND.gated_ffn(x, weights, ids, expand.contiguous(), contract)
    BACKEND.gated_ffn(
        *(t.bfloat16() if t.is_floating_point() else t for t in (x, weights, ids, expand, contract))
    )
    assert calls == []


@pytest.mark.parametrize("tokens", [1, 7, 90])
def test_threads_change_nothing(tokens: int) -> None:
    given_ = for_kernels(tokens, 5, 2, (96, 176, 80))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(BACKEND.gated_ffn(*given_))
    finally:
        torch.set_num_threads(before)
    for outputs in found[1:]:
        torch.testing.assert_close(outputs, found[0], rtol=0, atol=0)


def test_what_the_kernels_make_of_a_token_does_not_depend_on_the_others() -> None:
    x, weights, ids, *stacks = for_kernels(64, 6, 2)
    together = BACKEND.gated_ffn(x, weights, ids, *stacks)
    for number in (5, 23):
        alone = BACKEND.gated_ffn(x[:number], weights[:number], ids[:number], *stacks)
        torch.testing.assert_close(alone, together[:number], rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), 1e15, -1e15])
def test_an_extreme_token_is_its_own_alone(value: float) -> None:
    x, weights, ids, *stacks = for_kernels(12, 3, 2)
    expected = BACKEND.gated_ffn(x, weights, ids, *stacks)
    x[5, 7] = value
    found = BACKEND.gated_ffn(x, weights, ids, *stacks)
    others = torch.arange(12) != 5
    torch.testing.assert_close(found[others], expected[others], rtol=0, atol=0)
    np.testing.assert_allclose(found[5], exact(Problem(x, weights, ids, *stacks))[5], rtol=1e-4)


@pytest.mark.parametrize("gate", [-90.0, -1e4, -3e38, 88.0, 1e38, 0.0])
def test_gates_far_from_zero(gate: float) -> None:
    """The gates of every hidden unit are this, and the other branch is 2."""
    x = torch.full((3, 16), 1 / 16)
    expand = torch.cat([torch.full((1, 16, 16), gate), torch.full((1, 16, 16), 2.0)], dim=1)
    contract = torch.eye(16).unsqueeze(0)
    ids, weights = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    found = BACKEND.gated_ffn(x, weights, ids, expand.mT, contract.mT)
    silu = torch.nn.functional.silu(torch.tensor(gate, dtype=torch.float64))
    np.testing.assert_allclose(found, (2 * silu).float().expand(3, 16), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("tokens", [2, 30])
def test_what_does_not_fit_is_torchs_error(tokens: int) -> None:
    x, weights, ids, expand, contract = for_kernels(tokens, 4, 2)
    for wrong in (
        (x[:, :32].contiguous(), weights, ids, expand, contract),
        (x, weights, ids, expand, for_kernels(1, 4, 2, (48, 96, 32))[4]),
        (x, weights, ids + 4, expand, contract),
        (x[: tokens // 2], weights, ids, expand, contract),
        (x, weights, ids, expand[:2], contract[:2]),
    ):
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            BACKEND.gated_ffn(*wrong)


FORWARD = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
import torch
from moecast.backends import TorchBackend, cpu
generator = torch.Generator().manual_seed(0)
x = torch.randn(9, 32, generator=generator)
expand = torch.randn(4, 64, 32, generator=generator).mT / 8
contract = torch.randn(4, 16, 32, generator=generator).mT / 8
ids = (torch.arange(18) % 4).view(9, 2)
y = TorchBackend().gated_ffn(x, torch.ones(9, 2), ids, expand, contract)
print(cpu.takes(x, 9, range(4), expand, contract), *y.flatten().tolist())
"""


def forward(folder: Path, **environment: str) -> tuple[bool, list[float], str]:
    """In a new process that keeps its kernels in this folder: whether by them, outputs, log."""
    done = subprocess.run(
        [sys.executable, "-c", FORWARD],
        env={**os.environ, "XDG_CACHE_HOME": str(folder), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    taken, *values = done.stdout.split()
    return taken == "True", [float(value) for value in values], done.stderr


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Where the first process kept its kernels, and its outputs."""
    folder = tmp_path_factory.mktemp("cache")
    taken, values, _ = forward(folder)
    assert taken
    return folder, values


def test_compiled_once_and_kept(first: tuple[Path, list[float]]) -> None:
    folder, values = first
    (library,) = (folder / "moecast").iterdir()
    written = library.stat().st_mtime_ns
    # Were they compiled again, it would be noticed that there is no compiler.
    assert forward(folder, PATH="")[:2] == (True, values)
    assert library.stat().st_mtime_ns == written


def test_what_is_no_library_is_replaced(first: tuple[Path, list[float]], tmp_path: Path) -> None:
    (kept,) = (first[0] / "moecast").iterdir()
    library = tmp_path / "moecast" / kept.name
    library.parent.mkdir()
    library.write_text("no library")
    assert forward(tmp_path)[:2] == (True, first[1])
    assert list(library.parent.iterdir()) == [library]
    assert library.stat().st_size > 1000


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CC": "no-such-compiler"}, "no-such-compiler"),
        ({"CC": "false"}, "false"),
        ({"CC": "cc 'x"}, "No closing quotation"),
        ({"MOECAST_C_KERNELS": "0"}, "MOECAST_C_KERNELS is 0"),
    ],
)
def test_without_a_compiler_torch_computes_the_same(
    first: tuple[Path, list[float]], tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    taken, values, log = forward(tmp_path, **environment)
    assert not taken
    assert log.count("Experts of a few rows are torch's products") == 1
    assert reason in log
    np.testing.assert_allclose(values, first[1], rtol=1e-5, atol=1e-6)


def test_a_folder_that_cannot_be_written_is_done_without(
    first: tuple[Path, list[float]], tmp_path: Path
) -> None:
    (tmp_path / "moecast").write_text("a file where the folder should be")
    assert forward(tmp_path)[:2] == (True, first[1])
