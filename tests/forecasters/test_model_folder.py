"""What a model folder from a stranger may and may not do."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import safetensors.torch
import torch
from gluonts.core.component import equals
from gluonts.torch.distributions import NormalOutput
from moecast.forecasters import MoEPredictor, MoLEEstimator, MoLEPredictor
from moecast.forecasters.serialization import ModelFolder, load_matching


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    small_predictor().serialize(folder)
    return folder


def small_predictor(**settings: Any) -> MoLEPredictor:
    estimator = MoLEEstimator(
        **{
            "freq": "D",
            "prediction_length": 3,
            "context_length": 6,
            "num_experts": 2,
            "hidden_dimension": 4,
            **settings,
        }
    )
    return MoLEPredictor(network=estimator.create_network(), device="cpu")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[dict], Any], name: str = "predictor.json") -> None:
    encoded = json.loads((folder / name).read_text())
    change(encoded)
    (folder / name).write_text(json.dumps(encoded))


def test_a_saved_predictor_is_read_back(folder: Path) -> None:
    predictor = MoLEPredictor.deserialize(folder, device="cpu")
    stored = safetensors.torch.load_file(str(folder / "model.safetensors"))
    weights = predictor.network.state_dict()
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], stored[name]) for name in stored)
    assert equals(predictor.network.config, small_predictor().network.config)
    assert sorted(path.name for path in folder.iterdir()) == [
        "gluonts-config.json",
        "model.safetensors",
        "predictor.json",
    ]


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is no folder"):
        MoLEPredictor.deserialize(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is no folder"):
        MoLEPredictor.deserialize(tmp_path / "file")


@pytest.mark.parametrize("name", ["gluonts-config.json", "predictor.json"])
def test_a_folder_of_something_else(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"is no serialised predictor: it has no '{name}'"):
        MoLEPredictor.deserialize(folder)


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no file 'model\.safetensors'"):
        MoLEPredictor.deserialize(folder)


def test_another_class_of_predictor(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a moecast.*MoLEPredictor, not a .*MoEPredictor"):
        MoEPredictor.deserialize(folder)
    rewrite(folder, lambda d: d.update(type="gluonts.model.Predictor"), "gluonts-config.json")
    with pytest.raises(ValueError, match=r"holds a gluonts.model.Predictor, not a moecast\."):
        MoLEPredictor.deserialize(folder)


def test_a_description_of_another_class(folder: Path) -> None:
    network = json.loads((folder / "predictor.json").read_text())["kwargs"]["network"]
    (folder / "predictor.json").write_text(json.dumps(network))
    with pytest.raises(ValueError, match=r"describes no .*MoLEPredictor"):
        MoLEPredictor.deserialize(folder)


@pytest.mark.parametrize("name", ["gluonts-config.json", "predictor.json"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_json(folder: Path, name: str, keep: float) -> None:
    text = (folder / name).read_text()
    (folder / name).write_text(text[: int(keep * len(text))])
    with pytest.raises(ValueError, match="damaged"):
        MoLEPredictor.deserialize(folder)


@pytest.mark.parametrize("name", ["gluonts-config.json", "predictor.json"])
@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00\x80", b"[]", b"3", b'{"a": 1}', b"[" * 100_000, b'{"__kind__": 1}']
)
def test_nonsense_instead_of_json(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged|describes no|is not imported"):
        MoLEPredictor.deserialize(folder)


@pytest.mark.parametrize("change", ["pop", "wrong", "unknown"])
def test_settings_that_do_not_fit(folder: Path, change: str) -> None:
    def apply(encoded: dict) -> None:
        settings = encoded["kwargs"]["network"]["kwargs"]["config"]["kwargs"]
        if change == "pop":
            del settings["num_experts"]
        elif change == "wrong":
            settings["num_experts"] = 99
        else:
            settings["colour"] = "red"

    rewrite(folder, apply)
    with pytest.raises(ValueError, match=r"predictor\.json is damaged: .*(num_experts|colour)"):
        MoLEPredictor.deserialize(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
def test_truncated_weights(folder: Path, keep: float) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        MoLEPredictor.deserialize(folder)


def test_weights_of_other_shapes(folder: Path) -> None:
    def smaller(encoded: dict) -> None:
        encoded["kwargs"]["network"]["kwargs"]["config"]["kwargs"]["hidden_dimension"] = 3

    rewrite(folder, smaller)
    with pytest.raises(ValueError, match=r"do not fit.*with shape .* \[.*4.*\] instead of \[.*3.*"):
        MoLEPredictor.deserialize(folder)


def test_messages_about_weights_name_a_few_of_them() -> None:
    network = torch.nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    weights = {"weight": torch.zeros(2, 4), **{f"extra{i}": torch.zeros(1) for i in range(5)}}
    with pytest.raises(ValueError, match="of the test do not fit") as caught:
        load_matching(network, weights, "the test")
    assert str(caught.value).endswith(
        "missing bias; unknown extra0, extra1, extra2 …; with shape weight [2, 4] instead of [2, 3]"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def set_head(head: Any) -> Callable[[dict], None]:
    def apply(encoded: dict) -> None:
        encoded["kwargs"]["network"]["kwargs"]["config"]["kwargs"]["distr_output"] = head

    return apply


def instance(name: str, *args: Any, **kwargs: Any) -> dict:
    return {"__kind__": "instance", "class": name, "args": list(args), "kwargs": kwargs}


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that leaves a trace when it is imported."""
    trace = tmp_path / "trace"
    module = tmp_path / "a_strangers_module.py"
    module.write_text(
        f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n"
        "from gluonts.torch.distributions import NormalOutput\n"
        "class Head(NormalOutput):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield trace
    sys.modules.pop("a_strangers_module", None)


@pytest.mark.parametrize("kind", ["instance", "type", "stateful"])
def test_a_strangers_module_is_not_imported(folder: Path, stranger: Path, kind: str) -> None:
    head = {"__kind__": kind, "class": "a_strangers_module.Head", "args": [], "kwargs": {}}
    rewrite(folder, set_head(head))
    with pytest.raises(
        ValueError, match=r"names 'a_strangers_module\.Head', which is not imported"
    ):
        MoLEPredictor.deserialize(folder)
    assert not stranger.exists()
    assert "a_strangers_module" not in sys.modules


def test_a_class_of_an_imported_module_is_read(folder: Path, stranger: Path) -> None:
    import a_strangers_module  # type: ignore[import-not-found]

    rewrite(folder, set_head(instance("a_strangers_module.Head")))
    # Its two parameters need another last layer than Student's t with three.
    predictor = ModelFolder(folder).read_predictor(MoLEPredictor)
    assert type(predictor.network.distr_output) is a_strangers_module.Head
    assert isinstance(predictor.network.distr_output, NormalOutput)


@pytest.mark.parametrize(
    "name",
    [
        "builtins.getattr",
        "builtins.eval",
        "builtins.__import__",
        "functools.partial",
        "os.system",
        "posix.system",
        "subprocess.Popen",
        "pathlib.Path",
        "torch.hub.load",
        "torch.os.system",
        "numpy.load",
        "a.b",
        "",
        "tuple",
    ],
)
@pytest.mark.parametrize("kind", ["instance", "type"])
def test_nothing_dangerous_is_called_or_handed_out(folder: Path, name: str, kind: str) -> None:
    rewrite(folder, set_head({"__kind__": kind, "class": name, "args": [], "kwargs": {}}))
    with pytest.raises(ValueError, match=f"names '{name}'"):
        MoLEPredictor.deserialize(folder)


@pytest.mark.parametrize("name", [None, 3, ["os.system"], {"a": "os.system"}])
def test_a_class_must_be_named_by_a_string(folder: Path, name: Any) -> None:
    rewrite(folder, set_head({"__kind__": "instance", "class": name}))
    with pytest.raises(ValueError, match=r"predictor\.json"):
        MoLEPredictor.deserialize(folder)


@pytest.mark.parametrize(
    "name",
    [
        "gluonts.core.component.functools.partial",
        "gluonts.core.serde._base.partial",
        "gluonts.env.os.system",
        "gluonts.dataset.common.shutil.rmtree",
        "moecast.forecasters.estimator.shutil.rmtree",
        "moecast.forecasters.serialization.safetensors.torch.load_file",
        "gluonts.core.serde.load_json",
    ],
)
@pytest.mark.parametrize("kind", ["instance", "type"])
def test_trusted_packages_are_no_way_to_what_they_import(
    folder: Path, name: str, kind: str
) -> None:
    """Only classes that these packages define themselves, not what their modules happen to name."""
    rewrite(folder, set_head({"__kind__": kind, "class": name, "args": [], "kwargs": {}}))
    with pytest.raises(ValueError, match=f"names '{name}'"):
        MoLEPredictor.deserialize(folder)


@pytest.mark.parametrize("kind", ["type", "stateful", "code", None])
def test_objects_are_made_by_their_constructors_only(folder: Path, kind: Any) -> None:
    """A class itself is of no use in a setting, and a stateful object skips every check."""
    name = "gluonts.torch.distributions.studentT.StudentTOutput"
    rewrite(folder, set_head({"__kind__": kind, "class": name, "kwargs": {"beta": 0.0}}))
    with pytest.raises(ValueError, match=r"predictor\.json"):
        MoLEPredictor.deserialize(folder)


def test_no_object_can_be_made_to_call_what_the_folder_names(folder: Path, tmp_path: Path) -> None:
    """A stateful object has any attribute the file gives it, even its methods."""
    target = tmp_path / "made_by_the_folder"
    call = instance(
        "gluonts.core.serde._base.partial",
        {"__kind__": "type", "class": "gluonts.env.os.mkdir"},
        str(target),
    )
    head = {
        "__kind__": "stateful",
        "class": "gluonts.torch.distributions.ImplicitQuantileNetworkOutput",
        "kwargs": {"get_args_proj": call},
    }
    rewrite(folder, set_head(head))
    with contextlib.suppress(ValueError):
        MoLEPredictor.deserialize(folder)
    assert not target.exists()


@pytest.mark.parametrize(
    "name", ["gluonts.time_feature.holiday.SpecialDateFeatureSet", "gluonts.no_such_module.Thing"]
)
def test_no_module_is_imported_because_a_file_names_it(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = name.rpartition(".")[0]
    for loaded in [loaded for loaded in sys.modules if loaded.startswith(module)]:
        monkeypatch.delitem(sys.modules, loaded)
    rewrite(folder, set_head(instance(name)))
    with pytest.raises(ValueError, match=r"predictor\.json"):
        MoLEPredictor.deserialize(folder)
    assert module not in sys.modules
