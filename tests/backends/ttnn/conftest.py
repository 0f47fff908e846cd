"""Which tests run where.

Those marked ``ttnn`` need ttnn and a device, which may be a mock one: then operations are
validated and their kernels compiled, but nothing runs, and no numbers are compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from moecast.backends.ttnn import what_is_missing

# Tests are no package; this is where they find model_cases and ttnn_cases.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "forecasters")]

MISSING = what_is_missing()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if MISSING is None:
        return
    for item in items:
        if item.get_closest_marker("ttnn"):
            item.add_marker(pytest.mark.skip(reason=f"make test-ttnn runs this: {MISSING}"))
