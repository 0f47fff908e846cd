"""The commands of the README's section about the command line run as they stand there."""

from __future__ import annotations

import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
from moecast.evaluation.cli import app
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]


def readme_commands() -> list[list[str]]:
    """The arguments of the `moecast` commands in the section's first block."""
    section = (ROOT / "README.md").read_text().partition("## From the command line")[2]
    block = section.split("```")[1].replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("moecast ")]


def test_the_readmes_commands_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    commands = readme_commands()
    assert [arguments[0] for arguments in commands] == ["train", "predict", "evaluate", "experts"]
    for arguments in commands:
        if find_spec("moecast.evaluation.html_report") is None and "--report" in arguments:
            position = arguments.index("--report")
            del arguments[position : position + 2]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
    forecasts = pd.read_csv("forecasts.csv", parse_dates=["ds"])
    data = pd.read_csv("examples/tourism.csv", parse_dates=["ds"])
    assert len(forecasts) == 6 * 12
    # Ready to be joined: the months that follow those of the data, by the same names.
    joined = pd.concat([data, forecasts.rename(columns={"mean": "y"})]).sort_values(["id", "ds"])
    steps = joined.groupby("id")["ds"].diff().dropna().dt.days
    assert steps.between(28, 31).all()
    scores = pd.read_csv("scores.csv")
    assert scores["forecaster"].tolist() == ["tourism", "SeasonalNaive"]
    assert not scores["trained_on_windows"].any()
