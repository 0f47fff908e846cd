"""Checkpoints in the published format: written, read, fine-tuned, and refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from gluonts.core.component import equals
from huggingface_hub import errors
from model_cases import forecast_values, moirai_moe, same_weights, series
from moecast.distributions import MixtureOutput, resolve_head
from moecast.forecasters import MoiraiMoEPredictor
from moecast.forecasters.moirai_moe.predictor import PublishedCheckpoint
from moirai_cases import (
    CONTEXT,
    COVARIATES,
    HORIZON,
    PATCH,
    fine_tuning,
    publishable,
    published,
    rewrite,
)

SETTINGS = {"prediction_length": HORIZON, "context_length": CONTEXT}
PACKAGE = "uni2ts.distribution"
MOIRAI = resolve_head("moirai_mixture")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[MoiraiMoEPredictor, Path]:
    folder = tmp_path_factory.mktemp("published")
    return published(folder), folder


@pytest.fixture
def checkpoint(written: tuple[MoiraiMoEPredictor, Path]) -> Path:
    """To be read only."""
    return written[1]


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def read(source: Any, **settings: Any) -> MoiraiMoEPredictor:
    return MoiraiMoEPredictor.from_pretrained(source, **{**SETTINGS, **settings})


def test_a_written_checkpoint_is_read_back(written: tuple[MoiraiMoEPredictor, Path]) -> None:
    predictor, folder = written
    copy = read(folder)
    assert same_weights(copy.network, predictor.network)
    assert not copy.network.training
    np.testing.assert_array_equal(
        forecast_values(copy, series()), forecast_values(predictor, series())
    )


def test_the_folder_is_as_published(checkpoint: Path) -> None:
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    config = json.loads((checkpoint / "config.json").read_text())
    assert config == {
        "attn_dropout_p": 0.0,
        "d_ff": 8,
        "d_model": 64,
        "distr_output": {
            "_target_": f"{PACKAGE}.MixtureOutput",
            "components": [
                {"_target_": f"{PACKAGE}.StudentTOutput"},
                {"_target_": f"{PACKAGE}.NormalFixedScaleOutput", "scale": 0.001},
                {"_target_": f"{PACKAGE}.NegativeBinomialOutput"},
                {"_target_": f"{PACKAGE}.LogNormalOutput"},
            ],
        },
        "dropout_p": 0.0,
        "max_seq_len": 16,
        "num_layers": 2,
        "patch_sizes": [PATCH],
        "scaling": True,
    }
    weights = safetensors.torch.load_file(str(checkpoint / "model.safetensors"))
    assert weights["encoder.centroid"].shape == (2, 32, 64)
    assert weights["encoder.centroid"].dtype == torch.float64
    assert weights["encoder.layers.1.ffn.experts.31.fc1.weight"].shape == (8, 64)
    assert weights["param_proj.proj.components.3.scale.weight"].shape == (1, PATCH, 64)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_heads": 4},
        {"num_experts": 5, "top_k": 3},
        {"patch_sizes": (2, 4, 8)},
        {"patch_sizes": (8, 2)},
        {"distr_output": "student_t"},
        {"distr_output": "mixture(normal, laplace)"},
        {"scaling": "none"},
        {"dropout": 0.25, "attention_dropout": 0.5},
        {"covariates_ahead": True, "window": COVARIATES},
        {"window": {"target_dim": 3}},
    ],
    ids=str,
)
def test_settings_of_ones_own_are_kept(settings: dict[str, Any], tmp_path: Path) -> None:
    first, second = tmp_path / "new" / "folder", tmp_path / "again"
    predictor = published(first, **settings)
    copy = read(first, freq="h", **settings.get("window", {}))
    # Heads made of others are compared by the files below.
    ours, theirs = (
        dataclasses.replace(each.network.config, distr_output=MOIRAI) for each in (predictor, copy)
    )
    assert equals(ours, theirs)
    assert same_weights(copy.network, predictor.network)
    copy.save_pretrained(second)
    for name in ("config.json", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_an_estimator_can_train_what_can_be_published(tmp_path: Path) -> None:
    predictor = moirai_moe()(
        distr_output="moirai_mixture", scaling="regularised_std", num_batches_per_epoch=1
    ).train(series())
    predictor.save_pretrained(tmp_path)
    assert same_weights(read(tmp_path).network, predictor.network)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_converted(folder: Path, precision: torch.dtype) -> None:
    path = str(folder / "model.safetensors")
    stored = {n: t.to(precision) for n, t in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(stored, path)
    network = read(folder).network
    for name, tensor in network.state_dict().items():
        expected = torch.float64 if name.endswith("centroids_EF") else torch.float32
        assert tensor.dtype == expected, name
    found = network.state_dict()["norm.weight"]
    torch.testing.assert_close(found, stored["encoder.norm.weight"].float())


def test_what_the_checkpoint_leaves_open_is_taken(checkpoint: Path) -> None:
    predictor = MoiraiMoEPredictor.from_pretrained(
        str(checkpoint),
        prediction_length=5,
        context_length=12,
        num_samples=6,
        patch_size=PATCH,
        decoding="reencode",
        lead_time=1,
        batch_size=3,
        device="cpu",
        target_dim=2,
        **COVARIATES,
    )
    window, config = predictor.network.window, predictor.network.config
    assert (window.prediction_length, window.context_length, window.lead_time) == (5, 12, 1)
    assert (window.target_dim, config.decoding, predictor.batch_size) == (2, "reencode", 3)
    entries = series(channels=2, features=True, beyond=6)
    for forecast in predictor.predict(entries):
        assert forecast.samples.shape == (6, 5, 2)


@pytest.mark.parametrize("context_length", [10, 16, 3])
def test_auto_takes_the_sizes_that_fit_into_the_context(
    tmp_path: Path, context_length: int
) -> None:
    published(tmp_path, patch_sizes=(4, 8, 12))
    network = read(tmp_path, context_length=context_length, patch_size="auto").network
    fitting = tuple(size for size in (4, 8, 12) if size <= context_length)
    assert network.patch_sizes == (fitting or (4,))
    assert network.config.trained_patch_sizes == (4, 8, 12)
    assert read(tmp_path, patch_size=8).network.patch_sizes == (8,)


def test_an_estimator_starts_from_a_checkpoint(
    written: tuple[MoiraiMoEPredictor, Path],
) -> None:
    predictor, folder = written
    estimator = fine_tuning(folder)
    assert same_weights(estimator.create_network(), predictor.network)
    assert isinstance(estimator.distr_output, MixtureOutput)
    assert estimator.network_config.d_model == 64
    trained = estimator.train(series())
    before, after = predictor.network.state_dict(), trained.network.state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    routers = {name for name in before if name.endswith("centroids_EF")}
    assert moved == set(before) - routers - unused(predictor.network)
    assert np.isfinite(forecast_values(trained, series())).all()


def unused(network: Any) -> set[str]:
    """Weights that univariate series without gaps do not reach."""
    return {name for name in network.state_dict() if name.endswith("variate_bias")}


def test_a_fine_tuned_model_is_published_again(checkpoint: Path, tmp_path: Path) -> None:
    trained = fine_tuning(checkpoint).train(series())
    trained.save_pretrained(tmp_path)
    assert same_weights(read(tmp_path).network, trained.network)
    names = [
        set(safetensors.torch.load_file(str(where / "model.safetensors")))
        for where in (tmp_path, checkpoint)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("name", "value", "fixed"),
    [
        ("d_model", 128, 64),
        ("d_ff", 16, 8),
        ("num_layers", 3, 2),
        ("num_heads", 2, 1),
        ("num_experts", 16, 32),
        ("top_k", 1, 2),
        ("max_seq_len", 512, 16),
    ],
)
def test_settings_that_contradict_the_checkpoint_are_refused(
    checkpoint: Path, name: str, value: int, fixed: int
) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} contradicts pretrained=.* has {fixed}"):
        fine_tuning(checkpoint, **{name: value})
    assert getattr(fine_tuning(checkpoint, **{name: fixed}).network_config, name) == fixed


@pytest.mark.parametrize(
    ("name", "value"), [("distr_output", "negative_binomial"), ("scaling", "mean")]
)
def test_a_head_or_scaling_beside_a_checkpoint_is_not_ignored(
    checkpoint: Path, name: str, value: str
) -> None:
    with pytest.raises(ValueError, match=f"{name}='{value}' contradicts pretrained=.*leave it out"):
        fine_tuning(checkpoint, **{name: value})
    fixed = getattr(fine_tuning(checkpoint).network_config, name)
    again = fine_tuning(checkpoint, **{name: fixed}).network_config
    assert repr(getattr(again, name)) == repr(fixed)


def test_tuning_a_part_needs_a_checkpoint() -> None:
    for tuning in ("last_layers", "low_rank"):
        with pytest.raises(ValueError, match=f"tuning='{tuning}' needs pretrained"):
            moirai_moe()(tuning=tuning)
    with pytest.raises(ValueError, match=r"tuning='lora' is unknown: .*full, last_layers, low_"):
        moirai_moe()(tuning="lora")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_weights(folder: Path, keep: float) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(ValueError, match=r"checkpoint/model\.safetensors is damaged"):
        read(folder)


def set_to(**changes: Any) -> Callable[[dict], Any]:
    return lambda config: config.update(changes)


def without(name: str) -> Callable[[dict], Any]:
    return lambda config: config.pop(name)


@pytest.mark.parametrize(
    ("change", "essential"),
    [
        (without("d_model"), "describes no MOIRAI-MoE model: 'd_model' is missing"),
        (without("distr_output"), "'distr_output' is missing"),
        (without("patch_sizes"), "'patch_sizes' is missing"),
        (set_to(num_register_tokens=4), "'num_register_tokens' is unknown"),
        (set_to(d_model="64"), "d_model='64' is no int"),
        (set_to(d_model=64.0), r"d_model=64\.0 is no int"),
        (set_to(num_layers=True), "num_layers=True is no int"),
        (set_to(num_layers=None), "num_layers=None is no int"),
        (set_to(scaling="std"), "scaling='std' is no bool"),
        (set_to(dropout_p="none"), "dropout_p='none' is no int"),
        (set_to(patch_sizes=16), "patch_sizes=16 is no list"),
        (set_to(patch_sizes=[]), r"patch_sizes=\[\] are no sizes"),
        (set_to(patch_sizes=[16, 0]), r"patch_sizes=\[16, 0\] are no sizes"),
        (set_to(patch_sizes=["16"]), r"patch_sizes=\['16'\] are no sizes"),
        (set_to(distr_output="student_t"), "distr_output='student_t' is no dict"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_configuration_of_another_architecture(
    folder: Path, change: Callable[[dict], Any], essential: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(ValueError, match=essential) as caught:
        read(folder)
    assert str(folder / "config.json") in str(caught.value)


def test_all_problems_of_a_configuration_are_told_at_once(folder: Path) -> None:
    """As of MOIRAI 1.0, which has other settings."""
    rewrite(folder, lambda config: (config.pop("d_ff"), config.update(patch_size=16, d_model="x")))
    with pytest.raises(ValueError, match=r"missing.*unknown.*is no int"):
        read(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"d_model": 0},
        {"d_model": -64},
        {"d_model": 66},
        {"d_ff": 0},
        {"num_layers": 0},
        {"num_experts": 0},
        {"num_experts_per_token": 33},
        {"max_seq_len": 0},
        {"dropout_p": 1.5},
        {"attn_dropout_p": -0.1},
    ],
    ids=str,
)
def test_sizes_that_no_model_has(folder: Path, changes: dict[str, Any]) -> None:
    rewrite(folder, set_to(**changes))
    with pytest.raises(ValueError, match=r"must|more than") as caught:
        read(folder)
    assert str(next(iter(changes.values()))) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "essential"),
    [
        ({"d_model": 128}, r"with shape .* \[.*64\] instead of \[.*128\]"),
        ({"d_ff": 16}, r"fc\d.*\.weight \[.*8.*\] instead of \[.*16.*\]"),
        ({"num_layers": 3}, r"missing encoder\.layers\.2"),
        ({"num_layers": 1}, r"unknown encoder\.layers\.1.*with shape encoder\.centroid"),
        ({"num_experts": 33}, r"missing encoder\.layers\.0\.ffn\.experts\.32"),
        ({"num_heads": 2}, r"q_norm\.weight \[64\] instead of \[32\]|k_norm"),
        ({"patch_sizes": [8]}, r"in_proj\.weight \[1, 64, 4\] instead of \[1, 64, 8\]"),
        ({"patch_sizes": [4, 4]}, r"instead of \[2, 64"),
        (
            {"distr_output": {"_target_": f"{PACKAGE}.StudentTOutput"}},
            r"missing param_proj\.proj\.df\.bias.*unknown param_proj\.proj\.components\.0",
        ),
    ],
)
def test_a_configuration_that_the_weights_do_not_fit(
    folder: Path, changes: dict[str, Any], essential: str
) -> None:
    rewrite(folder, set_to(**changes))
    with pytest.raises(ValueError, match=f"do not fit the network: .*{essential}") as caught:
        read(folder)
    assert str(folder / "model.safetensors") in str(caught.value)


def test_sizes_beyond_all_memory_are_compared_before_any_is_taken(folder: Path) -> None:
    rewrite(folder, set_to(d_model=2**20))
    with pytest.raises(ValueError, match="do not fit the network"):
        read(folder)


def test_weights_that_the_configuration_does_not_fit(folder: Path) -> None:
    path = str(folder / "model.safetensors")
    stored = safetensors.torch.load_file(path)
    stored["encoder.norm.weight"] = torch.ones(63)
    stored["stray"] = torch.ones(1)
    del stored["res_proj.bias"]
    safetensors.torch.save_file(stored, path)
    with pytest.raises(
        ValueError,
        match=r"missing res_proj\.bias; unknown stray; with shape encoder\.norm\.weight \[63\] in",
    ):
        read(folder)


def test_weights_that_do_not_fit_leave_a_network_as_it_was(folder: Path) -> None:
    path = str(folder / "model.safetensors")
    stored = safetensors.torch.load_file(path)
    for name in sorted(stored)[:: len(stored) // 5]:
        changed = {**stored, name: torch.zeros(1, 2, 3, 4)}
        safetensors.torch.save_file(changed, path)
        checkpoint = PublishedCheckpoint(folder)
        network = publishable().network
        with pytest.raises(ValueError, match=rf"{re.escape(name)} \[1, 2, 3, 4\] instead of"):
            checkpoint.load_into(network)
        assert same_weights(network, publishable().network)


TARGETS = [
    "os.system",
    "builtins.eval",
    "uni2ts.distribution.pareto.ParetoOutput",
    "uni2ts.distribution.os.system",
    "moecast.distributions.StudentTOutput",
    "",
    None,
    5,
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_an_unlisted_head_is_refused_and_nothing_is_called(
    folder: Path, target: Any, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.system", lambda command: pytest.fail("it was called"))
    head: dict[str, Any] = {"_target_": target}
    if nested:
        known = {"_target_": f"{PACKAGE}.StudentTOutput"}
        head = {"_target_": f"{PACKAGE}.MixtureOutput", "components": [known, head]}
    rewrite(folder, set_to(distr_output=head))
    with pytest.raises(ValueError, match=r"_target_=.* none of the known heads") as caught:
        read(folder)
    assert repr(target) in str(caught.value)
    assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    "head",
    [
        {},
        {"_target_": f"{PACKAGE}.MixtureOutput"},
        {"_target_": f"{PACKAGE}.MixtureOutput", "components": []},
        {"_target_": f"{PACKAGE}.MixtureOutput", "components": 3},
        {"_target_": f"{PACKAGE}.MixtureOutput", "components": ["student_t", "normal"]},
        {"_target_": f"{PACKAGE}.MixtureOutput", "components": None},
        {"_target_": f"{PACKAGE}.StudentTOutput", "command": "rm -r /"},
        {"_target_": f"{PACKAGE}.NormalFixedScaleOutput", "scale": "wide"},
        {"_target_": f"{PACKAGE}.NormalFixedScaleOutput", "scale": -1.0},
        {"_target_": f"{PACKAGE}.NormalFixedScaleOutput", "scale": None},
        {"_target_": ["uni2ts"]},
    ],
    ids=str,
)
def test_a_head_that_cannot_be_made_is_refused(folder: Path, head: dict[str, Any]) -> None:
    rewrite(folder, set_to(distr_output=head))
    with pytest.raises(ValueError, match=r"config\.json"):
        read(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"is no published checkpoint: it has no '{name}'"):
        read(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"3", b"null", b'"text"', b"[" * 100_000]
)
def test_nonsense_instead_of_settings(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        read(folder)


def test_an_empty_configuration(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"describes no MOIRAI-MoE model: .*missing"):
        read(folder)


def test_a_context_longer_than_the_model_reads(checkpoint: Path) -> None:
    """Sixteen patches of 4 steps, of which the horizon takes some."""
    assert read(checkpoint, context_length=60).network.window.context_length == 60
    with pytest.raises(
        ValueError, match=r"context_length=61 .* max_seq_len=16 .*at most context_length=60"
    ):
        read(checkpoint, context_length=61)
    with pytest.raises(ValueError, match=r"context_length=60 .* 5 steps.*context_length=56"):
        read(checkpoint, context_length=60, prediction_length=5)
    with pytest.raises(ValueError, match="at most context_length=0"):
        read(checkpoint, prediction_length=100)
    with pytest.raises(ValueError, match=r"context_length=61 .* max_seq_len=16"):
        fine_tuning(checkpoint, context_length=61)


@pytest.mark.parametrize(
    ("field", "width", "steps"),
    [("feat_dynamic_real", 2, HORIZON), ("past_feat_dynamic_real", 1, 0), ("target", 2, 0)],
)
def test_covariates_of_the_wrong_width(
    checkpoint: Path, field: str, width: int, steps: int
) -> None:
    predictor = read(checkpoint, target_dim=2, **COVARIATES)
    entries = series(channels=2, features=True, beyond=HORIZON)
    list(predictor.predict(entries))
    entry = entries[1]
    entry[field] = np.zeros((width + 1, entry["target"].shape[1] + steps))
    with pytest.raises(ValueError, match=rf"'series 1'.*{field} has shape \[{width + 1}, \d+\]"):
        list(predictor.predict(entries))
    del entry[field]
    with pytest.raises(ValueError, match=rf"'series 1' has no field '{field}'"):
        list(predictor.predict(entries))


def test_covariates_that_end_too_early(checkpoint: Path) -> None:
    predictor = read(checkpoint, num_feat_dynamic_real=2)
    with pytest.raises(ValueError, match=r"feat_dynamic_real has \d+ steps, but needs \d+"):
        list(predictor.predict(series(features=True, beyond=HORIZON - 1)))


@pytest.mark.parametrize("patch_size", [16, 1, 0, "4", [4, 8], "automatic", None])
def test_a_patch_size_that_the_checkpoint_lacks(checkpoint: Path, patch_size: Any) -> None:
    essential = rf"patch_size={re.escape(repr(patch_size))} is none of .*: choose 4, or 'auto'"
    with pytest.raises(ValueError, match=essential):
        read(checkpoint, patch_size=patch_size)
    if patch_size in (16, 1, [4, 8]):
        with pytest.raises(ValueError, match=essential):
            fine_tuning(checkpoint, patch_size=patch_size)


def test_an_unknown_decoding(checkpoint: Path) -> None:
    for make in (read, fine_tuning):
        with pytest.raises(ValueError, match=r"decoding='beam' is unknown: .*cached, reencode"):
            make(checkpoint, decoding="beam")


def test_no_samples(checkpoint: Path) -> None:
    for make in (read, fine_tuning):
        with pytest.raises(ValueError, match="num_samples=0 must be at least 1"):
            make(checkpoint, num_samples=0)


@pytest.mark.parametrize(
    "source",
    ["moirai", "./nowhere/model", "/nowhere/model", "~/model", "a/b/c", "../x", "nowhere/a/"],
)
def test_neither_a_folder_nor_a_name(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked")
    )
    with pytest.raises(ValueError, match=r"neither a folder nor the name of a model"):
        read(source)


def test_a_folder_given_as_a_path_is_never_looked_for_on_the_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked")
    )
    with pytest.raises(ValueError, match=r"'Salesforce/nowhere' is neither a folder nor"):
        read(Path("Salesforce/nowhere"))


def refuse_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **settings: Any) -> None:
        pytest.fail("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def test_a_name_on_the_hub_while_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refuse_the_network(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'a-lab/a-model' is not in the cache.* offline"):
        read("a-lab/a-model", cache_dir=tmp_path)


def test_a_name_on_the_hub_that_must_be_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refuse_the_network(monkeypatch)
    with pytest.raises(ValueError, match=r"'a-lab/a-model' is not in the cache.* offline"):
        read("a-lab/a-model", cache_dir=tmp_path, local_files_only=True)


# Of the library that the hub's client makes its requests with.
TransportError = errors.HfHubHTTPError.__mro__[1]
REFUSED: Any = SimpleNamespace(headers={}, request=None, status_code=404)


@pytest.mark.parametrize(
    "error",
    [
        OSError(101, "Network is unreachable"),
        TransportError("The read operation timed out"),
        errors.RepositoryNotFoundError("Repository Not Found", response=REFUSED),
        errors.GatedRepoError("Access is restricted", response=REFUSED),
        errors.RevisionNotFoundError("Revision Not Found", response=REFUSED),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_download_that_fails(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ValueError, match=r"'a-lab/a-model' cannot be downloaded: ") as caught:
        read("a-lab/a-model")
    assert str(error).split("\n")[0] in str(caught.value)


@pytest.mark.parametrize("name", ["a lab/a model", "nowhere/", "a--lab/a-model"])
def test_a_name_that_the_hub_does_not_allow(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refuse_the_network(monkeypatch)
    with pytest.raises(ValueError, match=f"'{name}' cannot be downloaded: ") as caught:
        read(name, cache_dir=tmp_path)
    assert "repo" in str(caught.value).lower()


class Hub:
    """Downloads from a folder, and writes down what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str, dict[str, Any]]] = []

    def __call__(self, name: str, file: str, **settings: Any) -> str:
        self.asked.append((name, file, settings))
        return str(self.folder / file)


@pytest.fixture
def hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(checkpoint)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    return hub


def test_a_checkpoint_on_the_hub_is_read(
    hub: Hub, written: tuple[MoiraiMoEPredictor, Path]
) -> None:
    predictor = read("a-lab/a-model", revision="v2", cache_dir="/some/where", token="secret")
    assert same_weights(predictor.network, written[0].network)
    settings = {"revision": "v2", "cache_dir": "/some/where", "token": "secret"}
    assert hub.asked == [
        ("a-lab/a-model", "config.json", settings),
        ("a-lab/a-model", "model.safetensors", settings),
    ]


def test_an_estimator_starts_from_the_hub(
    hub: Hub, written: tuple[MoiraiMoEPredictor, Path]
) -> None:
    estimator = fine_tuning(Path("a-lab/a-model"))
    assert same_weights(estimator.create_network(), written[0].network)
    assert [(name, settings) for name, _, settings in hub.asked] == [("a-lab/a-model", {})] * 2


def test_a_folder_goes_before_the_hub(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.parent / "a-lab").mkdir()
    folder.rename(folder.parent / "a-lab" / "a-model")
    monkeypatch.chdir(folder.parent)
    read("a-lab/a-model")
    assert not hub.asked


def test_a_damaged_download_is_named(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.folder = folder
    rewrite(folder, without("d_ff"))
    with pytest.raises(ValueError, match=r"'d_ff' is missing"):
        read("a-lab/a-model")


@pytest.mark.parametrize(
    ("settings", "essential"),
    [
        ({"scaling": "std"}, "scaling='std' has no published format"),
        (
            {"window": {"num_feat_static_real": 1}},
            "no static features.*feat_static_real.*use serialize",
        ),
        ({"distr_output": "gamma"}, "GammaOutput .*no published format"),
        ({"distr_output": "negative_binomial"}, "NegativeBinomialOutput .*no published format"),
    ],
)
def test_what_the_published_format_cannot_hold_is_refused(
    settings: dict[str, Any], essential: str, tmp_path: Path
) -> None:
    predictor = publishable(**settings)
    with pytest.raises(ValueError, match=essential):
        predictor.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
