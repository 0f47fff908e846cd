"""`moecast` as a shell sees it: version, completion, pipes, and known data sets."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import replace
from pathlib import Path
from pydoc import locate

import pandas as pd
import pytest
from cli_cases import Run
from moecast.evaluation import known_datasets
from moecast.evaluation.cli import COMMANDS, app
from moecast.evaluation.environment import version_of
from moecast.evaluation.known_datasets import KNOWN_DATASETS, KnownDataset, KnownFile
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[3]


def test_the_console_script_is_this_program() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    scripts = config["options.entry_points"]["console_scripts"]
    name, _, path = scripts.strip().partition(" = ")
    assert name == "moecast"
    assert callable(locate(path.replace(":", ".")))


def test_version(run: Run) -> None:
    code, stdout, _ = run("--version")
    assert (code, stdout) == (0, f"moecast {version_of('moecast')}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_overview_has_a_help(name: str, run: Run) -> None:
    code, stdout, _ = run(name, "--help")
    assert code == 0
    assert "Usage" in stdout


def test_a_misspelt_command_is_corrected(run: Run) -> None:
    code, _, stderr = run("pedict")
    assert code == 2
    assert "Did you mean 'predict'" in " ".join(stderr.split())


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("moecast ben", "benchmark"), ("moecast train mole --num-ex", "--num-experts")],
)
def test_the_shell_completes_commands_and_generated_options(typed: str, completed: str) -> None:
    words = len(typed.split()) - 1
    result = CliRunner().invoke(
        app,
        prog_name="moecast",
        env={
            "_MOECAST_COMPLETE": "complete_bash",
            "COMP_WORDS": typed,
            "COMP_CWORD": str(words),
            "_TYPER_COMPLETE_ARGS": typed,
        },
    )
    assert completed in result.stdout


def test_a_broken_pipe_is_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "moecast.evaluation", "datasets"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    stderr = process.stderr.read()
    process.wait(timeout=120)
    assert "Traceback" not in stderr
    assert "BrokenPipe" not in stderr


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownDataset:
    """A data set of one file, published in a folder."""
    path = tmp_path / "published" / "waves.csv"
    path.parent.mkdir()
    path.write_text("date,a\n2024-01-01,1\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    known = KnownDataset(
        "waves", "Waves", (KnownFile("waves.csv", path.as_uri(), digest),), "the sea", "none", 1
    )
    monkeypatch.setitem(KNOWN_DATASETS, "waves", known)
    monkeypatch.setenv(known_datasets.DATA_VARIABLE, str(tmp_path / "data"))
    return known


def test_a_download_is_found_by_the_list(run: Run, published: KnownDataset, tmp_path: Path) -> None:
    listing = tmp_path / "list.csv"
    found = []
    for _ in range(2):
        assert run("datasets", "--out", listing)[0] == 0
        found.append(pd.read_csv(listing).set_index("name").loc["waves"])
        code, _, stderr = run("datasets", "download", "waves")
        assert code == 0, stderr
    assert (found[0]["found"], found[0]["SHA-256"]) == ("no", "known")
    assert (found[1]["found"], found[1]["SHA-256"]) == (str(tmp_path / "data"), "as published")
    (tmp_path / "data" / "waves.csv").write_text("changed")
    assert run("datasets", "--out", listing)[0] == 0
    assert pd.read_csv(listing).set_index("name").loc["waves"]["SHA-256"] == "differs"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"sha256": "0" * 64}, "not the published 0000"),
        ({"url": "http://127.0.0.1:9/waves.csv"}, "cannot be reached"),
        ({"url": None, "sha256": None}, "not published in this form"),
    ],
)
def test_a_failed_download_leaves_nothing(
    file: dict,
    message: str,
    run: Run,
    published: KnownDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoiled = replace(published, files=(replace(published.files[0], **file),))
    monkeypatch.setitem(KNOWN_DATASETS, "waves", spoiled)
    code, _, stderr = run("datasets", "download", "waves")
    assert code == 2
    assert message in " ".join(stderr.split())
    assert not list((tmp_path / "data").glob("*"))


def test_checksums_are_stated_where_files_can_be_downloaded() -> None:
    for known in KNOWN_DATASETS.values():
        for file in known.files:
            assert (file.url is None) == (file.sha256 is None)
            assert file.sha256 is None or len(file.sha256) == 64
