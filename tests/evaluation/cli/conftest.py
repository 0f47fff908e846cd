"""A table of one's own, and models trained on it by the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_cases import COLUMNS, TINY, Run, sales
from moecast.evaluation.cli import app
from typer.testing import CliRunner


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs `moecast` in this process: exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return call


@pytest.fixture(scope="session")
def sales_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sales.csv"
    sales().to_csv(path, index=False)
    return path


@pytest.fixture(scope="session")
def model_dir(run: Run, sales_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MoLE trained without the last two windows."""
    out = tmp_path_factory.mktemp("models") / "tiny"
    code, _, stderr = run(
        "train", "mole", "--data", sales_csv, *COLUMNS, *TINY, "--epochs", 2, "--holdout", 2,
        "--out", out,
    )  # fmt: skip
    assert code == 0, stderr
    return out


@pytest.fixture(scope="session")
def covariate_model(run: Run, sales_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MoLE that reads the price, known ahead, and the shop."""
    out = tmp_path_factory.mktemp("models") / "covariates"
    code, _, stderr = run(
        "train", "mole", "--data", sales_csv, *COLUMNS, *TINY, "--max-steps", 2,
        "--feat-dynamic-real", "price", "--feat-static-cat", "shop", "--out", out,
    )  # fmt: skip
    assert code == 0, stderr
    return out
