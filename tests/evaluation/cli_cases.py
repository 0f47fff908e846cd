"""What the tests of the command line share: options of a tiny model, and a table to train it on."""

from __future__ import annotations

from typing import Callable

import numpy as np
import pandas as pd

Run = Callable[..., tuple[int, str, str]]

COLUMNS = ["--timestamp", "ds", "--item-id", "id", "--target", "y"]
TINY = [
    "--prediction-length", "6", "--context-length", "12", "--num-experts", "2",
    "--hidden-dimension", "4", "--num-batches-per-epoch", "2", "--accelerator", "cpu",
    "--seed", "0",
]  # fmt: skip


def sales(items: str = "abc", hours: int = 60, start: str = "2024-01-01") -> pd.DataFrame:
    """Hourly sales of items with a price known ahead and a shop; the id looks like a number."""
    generator = np.random.default_rng(0)
    parts = []
    for number, name in enumerate(items):
        when = pd.date_range(start, periods=hours, freq="h")
        level = 10 * (number + 1) + 3 * np.sin(2 * np.pi * when.hour / 24)
        price = generator.uniform(1, 2, size=hours).round(2)
        parts.append(
            pd.DataFrame(
                {
                    "id": f"00{number}",
                    "ds": when,
                    "y": (level - price + generator.normal(size=hours)).round(3),
                    "price": price,
                    "shop": name,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
