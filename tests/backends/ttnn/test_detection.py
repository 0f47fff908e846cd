"""What is said of a machine, without ttnn."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Callable, Optional

import pytest
from moecast.backends import BackendUnavailableError, get_backend
from moecast.backends.ttnn import TtnnBackend, detection, find_device, what_is_missing

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """A machine that has what it is told to have and nothing else."""

    def has(
        *,
        chips: int = 0,
        simulator: str = "",
        mock: str = "",
        ttnn: bool = False,
        compiler: bool = False,
    ) -> None:
        nodes = tmp_path / "nodes"
        for i in range(chips):
            nodes.mkdir(exist_ok=True)
            (nodes / str(i)).touch()
        monkeypatch.setattr(detection, "_DEVICE_NODES", nodes)
        monkeypatch.setattr(detection, "_SYSTEM_WIDE", tmp_path / "opt")
        for name, value in (
            ("TT_METAL_SIMULATOR", simulator),
            ("TT_METAL_MOCK_CLUSTER_DESC_PATH", mock),
            ("MOECAST_BACKEND", ""),
        ):
            monkeypatch.setenv(name, value)
        if compiler:
            path = tmp_path / "ttnn" / "runtime" / "sfpi" / "compiler" / "bin"
            path.mkdir(parents=True)
            (path / "riscv-tt-elf-g++").touch()
        spec: Optional[importlib.machinery.ModuleSpec] = None
        if ttnn:
            origin = str(tmp_path / "ttnn" / "__init__.py")
            spec = importlib.machinery.ModuleSpec("ttnn", None, origin=origin)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)

    return has


@pytest.mark.parametrize(
    ("there", "part"),
    [
        ({}, "no Tenstorrent device"),
        ({"ttnn": True, "compiler": True}, "no Tenstorrent device"),
        ({"chips": 1}, "ttnn is not installed; it has wheels for Python 3.10 and 3.12"),
        ({"simulator": "sim.so", "ttnn": True}, "SFPI compiler"),
        ({"mock": "m.yaml", "ttnn": True}, "SFPI compiler"),
    ],
)
def test_what_is_missing_is_one_sentence(machine: Machine, there: dict, part: str) -> None:
    machine(**there)
    assert part in (what_is_missing() or "")
    with pytest.raises(BackendUnavailableError, match="backend='ttnn' cannot be had: ") as caught:
        get_backend("ttnn")
    assert "\n" not in str(caught.value)
    assert get_backend().name == get_backend("auto").name == "torch"


@pytest.mark.parametrize(
    ("there", "kind", "name"),
    [
        ({"chips": 2}, "chip", "nodes/0"),
        ({"simulator": "sim.so"}, "simulator", "sim.so"),
        ({"chips": 1, "simulator": "sim.so"}, "simulator", "sim.so"),
    ],
)
def test_auto_takes_a_device(machine: Machine, there: dict, kind: str, name: str) -> None:
    machine(**there, ttnn=True, compiler=True)
    device = find_device()
    assert device is not None
    assert device.kind == kind
    assert name in device.name
    assert what_is_missing() is None
    assert get_backend("auto") == get_backend("ttnn") == TtnnBackend()


def test_a_mock_device_is_taken_by_name_only(machine: Machine) -> None:
    machine(mock="m.yaml", ttnn=True, compiler=True)
    assert get_backend("auto").name == "torch"
    assert get_backend("ttnn").name == "ttnn"


def test_the_environment_may_name_it(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    monkeypatch.setenv("MOECAST_BACKEND", "ttnn")
    with pytest.raises(BackendUnavailableError):
        get_backend("auto")
    assert get_backend("torch").name == "torch"


def test_precision_is_a_setting_of_ttnn(machine: Machine) -> None:
    machine(chips=1, ttnn=True, compiler=True)
    assert get_backend("ttnn", "float32") == TtnnBackend("float32")
    with pytest.raises(ValueError, match="precision='float64' is unknown: choose one of bfloat16"):
        get_backend("ttnn", "float64")
    with pytest.raises(ValueError, match="precision='float32' is a setting of backend='ttnn'"):
        get_backend("torch", "float32")


def test_logs_are_quiet_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TT_METAL_LOGGER_LEVEL", "Info")
    detection.quieten()
    assert os.environ["TT_METAL_LOGGER_LEVEL"] == "Info"


def test_choosing_a_backend_imports_and_says_nothing() -> None:
    code = (
        "import sys\nfrom moecast.backends import get_backend\nget_backend('auto')\n"
        "assert 'ttnn' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
