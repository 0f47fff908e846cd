"""Who may import whom: the arrows of docs/architecture.md, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("backends", "distributions", "forecasters", "evaluation")

# What each package may import of the project and, where that is limited, of others.
PROJECT = {
    "backends": {"backends"},
    "distributions": {"distributions"},
    "forecasters": {"forecasters", "distributions", "backends"},
    "evaluation": {"evaluation"},
}
LIBRARIES = {
    "backends": {"torch", "numpy", "triton", "ttnn", "loguru"},
    "distributions": {"torch", "gluonts", "numpy", "scipy"},
}
# These start everything, and are imported by nothing but each other.
ENTRY_POINTS = {"evaluation.cli", "evaluation.__main__", "evaluation.demo"}


def source_files() -> Iterator[Path]:
    for package in PACKAGES:
        base = ROOT / package
        # Beside the checkout, as in an installed package, the packages lie below `moecast`.
        yield from sorted((base if base.is_dir() else ROOT / "moecast" / package).rglob("*.py"))


def is_entry_point(module: str) -> bool:
    return any(f"{module}.".startswith(f"{entry}.") for entry in ENTRY_POINTS)


def module_name(path: Path) -> str:
    """`forecasters.moe.routers`, without the root package."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "moecast":
        parts = parts[1:]
    return ".".join(parts)


def imports_of(source: str, module: str) -> set[str]:
    """Full names of what a module imports: `torch.nn`, or `moecast.backends.torch`."""
    package = ["moecast", *module.split(".")[:-1]]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, node.module] if node.module else base)
            found |= {f"{name}.{alias.name}" for alias in node.names}
    return found


def violations(source: str, module: str, model_folders: set[str]) -> list[str]:
    """What a module imports and must not."""
    package = module.split(".")[0]
    found = []
    for name in sorted(imports_of(source, module)):
        root, *rest = name.split(".")
        target = ".".join(rest)
        allowed = True
        if root == "moecast":
            allowed = is_entry_point(module) or (bool(rest) and rest[0] in PROJECT[package])
            allowed &= not _models_meet(module, target, model_folders)
            if is_entry_point(target):
                allowed &= is_entry_point(module)
        elif root in (*PACKAGES, "benchmarks", "notebooks", "tests"):
            allowed = False
        elif root == "ttnn":
            allowed = module.startswith("backends.ttnn.")
        elif package in LIBRARIES and root not in sys.stdlib_module_names:
            allowed = root in LIBRARIES[package]
        if not allowed:
            found.append(name)
    return found


def _models_meet(module: str, target: str, model_folders: set[str]) -> bool:
    """Whether a model, or what all models share, imports (another) model."""
    reached = {folder for folder in model_folders if f"{target}.".startswith(f"{folder}.")}
    own = {folder for folder in model_folders if module.startswith(f"{folder}.")}
    public = module == "forecasters.__init__" or is_entry_point(module)
    return bool(reached - own) and not public


def model_folders() -> set[str]:
    """Each model's folder has an estimator of its own."""
    return {
        module_name(path.parent / "x").removesuffix(".x")
        for path in source_files()
        if path.name == "estimator.py" and path.parent.name != "forecasters"
    }


def test_the_source_is_found() -> None:
    modules = {module_name(path) for path in source_files()}
    assert {"backends.torch", "distributions.names", "evaluation.cli.train"} <= modules
    assert "forecasters.mole" in model_folders()


@pytest.mark.parametrize("path", list(source_files()), ids=module_name)
def test_imports_follow_the_arrows(path: Path) -> None:
    assert violations(path.read_text(), module_name(path), model_folders()) == []


@pytest.mark.parametrize(
    ("module", "source", "forbidden"),
    [
        ("backends.torch", "from torch import Tensor\nimport os.path", []),
        ("backends.torch", "from ..forecasters.moe import Router", ["moecast.forecasters.moe.Rou"]),
        ("backends.torch", "from .. import distributions", ["moecast.distributions"]),
        ("backends.torch", "import gluonts", ["gluonts"]),
        ("backends.torch", "import ttnn", ["ttnn"]),
        ("backends.ttnn.ops", "import ttnn\nfrom ...backends import Backend", []),
        ("distributions.names", "from ..backends import Backend", ["moecast.backends.Backend"]),
        ("distributions.names", "import lightning", ["lightning"]),
        ("forecasters.moe.experts", "from ...backends import Backend\nimport lightning", []),
        ("forecasters.predictor", "from .mole import MoLEConfig", ["moecast.forecasters.mole.M"]),
        ("forecasters.mole.network", "from .config import A\nfrom ..fields import B", []),
        ("forecasters.mole.network", "from ..other.network import A", ["moecast.forecasters.oth"]),
        ("forecasters.__init__", "from .mole import A\nfrom .other import B", []),
        ("forecasters.mole.network", "import ttnn", ["ttnn"]),
        ("forecasters.mole.ttnn_network", "import ttnn", ["ttnn"]),
        ("forecasters.features", "from ..evaluation import backtest", ["moecast.evaluation.back"]),
        ("forecasters.features", "def f():\n    import moecast.evaluation", ["moecast.evaluation"]),
        ("evaluation.backtest", "from ..forecasters import MoLE", ["moecast.forecasters.MoLE"]),
        ("evaluation.backtest", "from .cli import app", ["moecast.evaluation.cli.app"]),
        ("evaluation.backtest", "from . import cli", ["moecast.evaluation.cli"]),
        ("evaluation.cli", "from ..forecasters.mole import A\nfrom .backtest import b", []),
        ("evaluation.cli.train", "from ...forecasters.mole import A\nfrom .console import b", []),
        ("evaluation.report", "from .cli.console import say", ["moecast.evaluation.cli.console"]),
        ("evaluation.__main__", "from .cli import app", []),
        ("evaluation.metrics", "import distributions", ["distributions"]),
        ("evaluation.metrics", "from benchmarks import x", ["benchmarks.x"]),
    ],
)
def test_the_rules_see_what_breaks_them(module: str, source: str, forbidden: list[str]) -> None:
    found = violations(source, module, {"forecasters.mole", "forecasters.other"})
    assert len(found) == len(forbidden)
    assert all(name.startswith(start) for name, start in zip(found, forbidden))


# What only some need, and what takes seconds to import; the libraries that every forecaster
# stands on are imported first, and answer for themselves.
ON_DEMAND = {"huggingface_hub", "jax", "moecast.backends.cuda", "triton", "ttnn", "uni2ts"}
IMPORTING = """
import sys
import gluonts.torch, lightning.pytorch
before = set(sys.modules)
import moecast.forecasters
print(*sorted(set(sys.modules) - before))
"""


def test_forecasters_import_what_is_needed_on_demand_only() -> None:
    output = subprocess.run(
        [sys.executable, "-c", IMPORTING], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    imported = set(output.split())
    assert "moecast.forecasters.moirai_moe.predictor" in imported
    assert imported & ON_DEMAND == set()
