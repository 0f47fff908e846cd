"""Small series and the real files beside the repository."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Callable

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
# Tests are no package; this is where they and `--forecaster` find known_forecasters.
sys.path.insert(0, str(Path(__file__).parent))

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def shared_file() -> Callable[[str], Path]:
    def locate(name: str) -> Path:
        path = SHARED_DATA / name
        if not path.is_file():
            pytest.skip(f"real data are not at {path}")
        return path

    return locate


@pytest.fixture
def hourly() -> list[dict]:
    """Two univariate hourly series of 200 and 240 steps with a daily season and noise."""
    generator = np.random.default_rng(0)
    entries = []
    for number, length in enumerate((200, 240)):
        daily = np.sin(2 * np.pi * np.arange(length) / 24)
        target = 10 + 3 * daily + generator.normal(scale=0.3, size=length)
        entries.append(
            {
                "item_id": f"series {number}",
                "start": pd.Period("2024-01-01", freq="h"),
                "target": target.astype(np.float32),
            }
        )
    return entries


@pytest.fixture
def multivariate() -> list[dict]:
    """One series of three channels and 60 days."""
    target = np.random.default_rng(1).normal(5, 1, size=(3, 60)).astype(np.float32)
    return [{"item_id": "m", "start": pd.Period("2024-01-01", freq="D"), "target": target}]


@pytest.fixture
def hourly_csv(tmp_path: Path) -> Path:
    """A file of 100 hours and two columns, `a` counting up and `b` down."""
    dates = pd.date_range("2024-01-01", periods=100, freq="h")
    path = tmp_path / "tiny.csv"
    frame = pd.DataFrame({"date": dates, "a": np.arange(100.0), "b": -np.arange(100.0)})
    frame.to_csv(path, index=False)
    return path
