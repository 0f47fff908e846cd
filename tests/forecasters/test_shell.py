"""GluonTS's command line, `python -m gluonts.shell train` and `serve`, as processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
from gluonts.dataset.common import ListDataset
from gluonts.model.predictor import Predictor
from gluonts.torch.model.forecast import DistributionForecast
from model_cases import HORIZON, series
from moecast.forecasters import (
    HierarchicalAutoformerPredictor,
    MoiraiMoEPredictor,
    MoLEPredictor,
)

pytest.importorskip("waitress")
pytest.importorskip("flask")
from click.testing import CliRunner
from gluonts.shell.__main__ import cli

pytestmark = pytest.mark.shell

# The `serve` command itself listens on port 8080 of all interfaces. This runs it as it is, but
# for the address: a free port of the loopback interface, which it prints.
SERVE = """
import sys
import waitress

def serve(app, listen):
    server = waitress.create_server(app, host="127.0.0.1", port=0)
    print("port", server.effective_port, flush=True)
    server.run()

waitress.serve = serve
from gluonts.shell.__main__ import cli
cli(["serve", "--data-path", sys.argv[1]])
"""

MOLE = "moecast.forecasters.MoLEEstimator"
MOIRAI_MOE = "moecast.forecasters.MoiraiMoEEstimator"
AUTOFORMER = "moecast.forecasters.HierarchicalAutoformerEstimator"

SHARED_HYPERPARAMETERS = {
    "prediction_length": str(HORIZON),
    "context_length": "64",
    "lr": "0.01",
    "batch_size": "8",
    "num_batches_per_epoch": "5",
    "seed": "3",
    "distr_output": "gluonts.torch.distributions.NormalOutput",
    "trainer_kwargs": '{"max_epochs": 2, "enable_progress_bar": false, "accelerator": "cpu"}',
    "test_quantiles": "[0.1, 0.5, 0.9]",
}
HYPERPARAMETERS = {
    **SHARED_HYPERPARAMETERS,
    "patch_size": "auto",
    "num_experts": "2",
    "top_k": "1",
    "noisy_routing": "true",
    "hidden_dimension": "8",
}
MOIRAI_MOE_HYPERPARAMETERS = {
    **SHARED_HYPERPARAMETERS,
    "patch_size": "[8, 2]",
    "d_model": "16",
    "d_ff": "8",
    "num_layers": "2",
    "num_heads": "2",
    "num_experts": "4",
    "top_k": "1",
    "dropout": "0.1",
    "covariates_ahead": "false",
    "decoding": "reencode",
    "num_samples": "25",
}
AUTOFORMER_HYPERPARAMETERS = {
    **SHARED_HYPERPARAMETERS,
    "patch_size": "[4, 8]",
    "d_model": "8",
    "d_ff": "8",
    "num_heads": "2",
    "num_experts": "3",
    "label_length": "16",
    "wavelet": "db2",
    "decomposition": "layers",
    "moving_average": "5",
    "delay_factor": "1.5",
}


def json_lines(path: Path, entries: list[dict]) -> None:
    path.parent.mkdir(parents=True)
    with path.open("w") as file:
        for entry in entries:
            fields = {name: np.asarray(v).tolist() for name, v in entry.items() if name != "start"}
            file.write(json.dumps({**fields, "start": str(entry["start"])}) + "\n")


def data_folder(root: Path, hyperparameters: dict[str, str]) -> Path:
    data = series("positive", features=True)
    for entry in data:
        del entry["item_id"], entry["stray"]
        entry["feat_static_cat"] = entry["feat_static_cat"][:1]
    history = []
    for entry in data:
        short = {**entry, "target": entry["target"][:-HORIZON]}
        short["feat_dynamic_real"] = entry["feat_dynamic_real"][:, :-HORIZON]
        short["past_feat_dynamic_real"] = entry["past_feat_dynamic_real"][:, :-HORIZON]
        history.append(short)
    channels = root / "input" / "data"
    json_lines(channels / "train" / "part.json", history)
    json_lines(channels / "validation" / "part.json", history)
    json_lines(channels / "test" / "part.json", data)
    (channels / "metadata").mkdir()
    (channels / "metadata" / "metadata.json").write_text(json.dumps({"freq": "H"}))
    (root / "input" / "config").mkdir()
    (root / "input" / "config" / "hyperparameters.json").write_text(json.dumps(hyperparameters))
    for folder in ("model", "output"):
        (root / folder).mkdir()
    return root


def train(root: Path, here: Path, forecaster: str = MOLE) -> None:
    command = [sys.executable, "-m", "gluonts.shell", "train", "--data-path", str(root)]
    command += ["--forecaster", forecaster]
    process = subprocess.run(
        command,
        cwd=here,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = data_folder(tmp_path_factory.mktemp("shell"), HYPERPARAMETERS)
    here = tmp_path_factory.mktemp("here")
    train(root, here)
    assert not list(here.iterdir())
    return root


def test_training_writes_a_model_of_the_derived_settings(trained: Path) -> None:
    predictor = Predictor.deserialize(trained / "model")
    assert isinstance(predictor, MoLEPredictor)
    window = predictor.network.window
    assert window.freq.lower() == "h"
    assert window.target_dim == 1
    assert window.num_feat_dynamic_real == 2
    assert window.num_past_feat_dynamic_real == 1
    assert window.num_feat_static_real == 1
    assert window.cardinality == (3,)
    config = predictor.network.config
    assert config.patch_sizes == (1, 32)
    assert (config.num_experts, config.top_k, config.noisy_routing) == (2, 1, True)
    assert type(config.distr_output).__name__ == "NormalOutput"
    assert not (trained / "output" / "failure").exists()


def check_metrics(root: Path) -> None:
    metrics = json.loads((root / "model" / "agg_metrics.json").read_text())
    for name in ("MSE", "MASE", "MAPE", "sMAPE", "MSIS", "ND", "RMSE", "mean_wQuantileLoss"):
        assert np.isfinite(metrics[name]), name
    assert 0 <= metrics["Coverage[0.1]"] <= metrics["Coverage[0.9]"] <= 1
    items = (root / "model" / "item_metrics.csv").read_text().splitlines()
    assert len(items) == 1 + len(series())


def test_training_writes_finite_metrics(trained: Path) -> None:
    check_metrics(trained)


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """The address of a server of the model below a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        assert words[:1] == ["port"], "the server did not start"
        yield f"http://127.0.0.1:{words[1]}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)


@pytest.fixture(scope="module")
def server(trained: Path) -> Iterator[str]:
    with serving(trained) as address:
        yield address


def invoke(server: str, instances: list[dict], **configuration: Any) -> list[dict]:
    body = {"instances": instances, "configuration": {"freq": "H", **configuration}}
    request = urllib.request.Request(
        f"{server}/invocations",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())["predictions"]


def instances() -> list[dict]:
    requests = []
    for entry in series("positive", features=True, beyond=HORIZON):
        fields = {name: np.asarray(v).tolist() for name, v in entry.items() if name != "start"}
        fields["feat_static_cat"] = fields["feat_static_cat"][:1]
        requests.append({**fields, "start": str(entry["start"])})
    return requests


def test_server_answers_ping(server: str) -> None:
    with urllib.request.urlopen(f"{server}/ping", timeout=30) as response:
        assert response.status == 200


def test_server_forecasts_as_the_model_does(trained: Path, server: str) -> None:
    answers = invoke(server, instances(), quantiles=["0.1", "0.5", "0.9"])
    entries = series("positive", features=True, beyond=HORIZON)
    for entry in entries:
        entry["feat_static_cat"] = entry["feat_static_cat"][:1]
    forecasts = list(Predictor.deserialize(trained / "model").predict(entries))
    assert len(answers) == len(forecasts)
    for answer, forecast in zip(answers, forecasts):
        np.testing.assert_allclose(answer["mean"], forecast.mean, rtol=1e-4)
        for level in ("0.1", "0.5", "0.9"):
            np.testing.assert_allclose(
                answer["quantiles"][level], forecast.quantile(level), rtol=1e-4
            )


def test_server_says_what_is_wrong_with_a_request(server: str) -> None:
    request = instances()[0]
    del request["feat_dynamic_real"]
    with pytest.raises(urllib.error.HTTPError) as error:
        invoke(server, [request])
    assert error.value.code == 500
    assert "has no field 'feat_dynamic_real'" in error.value.read().decode()
    assert len(invoke(server, instances()[:1])) == 1


def test_training_goes_on_from_a_model_channel(trained: Path, tmp_path: Path) -> None:
    """With a learning rate of next to nothing the weights stay those of the model channel."""
    still = {**HYPERPARAMETERS, "lr": "1e-12", "weight_decay": "0", "seed": "4"}
    root = tmp_path / "again"
    root.mkdir()
    data_folder(root, still)
    channel = root / "input" / "data" / "model"
    channel.mkdir()
    with tarfile.open(channel / "model.tar.gz", "w:gz") as archive:
        for path in sorted((trained / "model").iterdir()):
            archive.add(path, path.name)
    train(root, tmp_path)
    before = Predictor.deserialize(trained / "model").network.state_dict()
    after = Predictor.deserialize(root / "model").network.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_allclose(after[name].numpy(), before[name].numpy(), atol=1e-6)
    assert (root / "model" / "agg_metrics.json").is_file()


def test_failure_is_written_where_the_platform_looks(tmp_path: Path) -> None:
    root = tmp_path / "failing"
    root.mkdir()
    data_folder(root, {**HYPERPARAMETERS, "top_k": "3"})
    arguments = ["train", "--data-path", str(root)]
    arguments += ["--forecaster", MOLE]
    assert CliRunner().invoke(cli, arguments).exit_code != 0
    failure = (root / "output" / "failure").read_text()
    assert failure.startswith("top_k=3 must lie between 1 and num_experts=2")


@pytest.fixture(scope="module")
def trained_moirai_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = data_folder(tmp_path_factory.mktemp("moirai-moe"), MOIRAI_MOE_HYPERPARAMETERS)
    train(root, root, MOIRAI_MOE)
    return root


def test_moirai_moe_is_trained_and_evaluated(trained_moirai_moe: Path) -> None:
    predictor = Predictor.deserialize(trained_moirai_moe / "model")
    assert isinstance(predictor, MoiraiMoEPredictor)
    assert predictor.num_samples == 25
    window, config = predictor.network.window, predictor.network.config
    assert (window.num_feat_dynamic_real, window.num_past_feat_dynamic_real) == (2, 1)
    assert (window.num_feat_static_real, window.cardinality) == (1, (3,))
    assert config.patch_sizes == (2, 8)
    assert (config.d_model, config.d_ff, config.num_layers, config.num_heads) == (16, 8, 2, 2)
    assert (config.num_experts, config.top_k, config.dropout) == (4, 1, 0.1)
    assert (config.covariates_ahead, config.decoding) == (False, "reencode")
    assert type(config.distr_output).__name__ == "NormalOutput"
    check_metrics(trained_moirai_moe)


def test_server_draws_as_many_paths_as_are_asked_for(trained_moirai_moe: Path) -> None:
    asked = {"quantiles": ["0.1", "0.9"], "output_types": ["mean", "quantiles", "samples"]}
    with serving(trained_moirai_moe) as address:
        answers = invoke(address, instances(), num_samples=300, **asked)
    assert len(answers) == len(series())
    for answer, entry in zip(answers, series("positive")):
        paths = np.array(answer["samples"])
        assert paths.shape == (300, HORIZON)
        np.testing.assert_allclose(answer["mean"], paths.mean(axis=0), rtol=1e-5)
        for level in ("0.1", "0.9"):
            below = (paths <= np.array(answer["quantiles"][level])).mean(axis=0)
            np.testing.assert_allclose(below, float(level), atol=0.01)
        assert (paths.std(axis=0) > 0).all()
        assert abs(np.median(paths) - entry["target"].mean()) < 5 * entry["target"].std()


def test_forecasts_within_a_patch_are_evaluated_as_distributions(tmp_path: Path) -> None:
    root = data_folder(tmp_path, {**MOIRAI_MOE_HYPERPARAMETERS, "patch_size": "8"})
    arguments = ["train", "--data-path", str(root), "--forecaster", MOIRAI_MOE]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    check_metrics(root)
    entries = ListDataset(instances(), freq="h")
    for forecast in Predictor.deserialize(root / "model").predict(entries):
        assert isinstance(forecast, DistributionForecast)


def test_autoformer_is_trained_evaluated_and_served(tmp_path: Path) -> None:
    root = data_folder(tmp_path, AUTOFORMER_HYPERPARAMETERS)
    train(root, root, AUTOFORMER)
    predictor = Predictor.deserialize(root / "model")
    assert isinstance(predictor, HierarchicalAutoformerPredictor)
    window, config = predictor.network.window, predictor.network.config
    assert (window.num_feat_dynamic_real, window.num_past_feat_dynamic_real) == (2, 1)
    assert (window.num_feat_static_real, window.cardinality) == (1, (3,))
    assert (config.patch_sizes, config.label_length) == ((4, 8), 16)
    assert (config.d_model, config.d_ff, config.num_heads) == (8, 8, 2)
    assert (config.num_experts, config.top_k) == (3, 1)
    assert (config.wavelet, config.decomposition) == ("db2", "layers")
    assert (config.moving_average, config.delay_factor) == (5, 1.5)
    check_metrics(root)
    with serving(root) as address:
        answers = invoke(address, instances(), output_types=["mean", "quantiles"])
    expected = predictor.predict(ListDataset(instances(), freq="h"))
    for answer, forecast in zip(answers, expected):
        np.testing.assert_allclose(answer["mean"], forecast.mean, rtol=1e-4)
