"""Reading a model folder without trusting it."""

import json
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Tuple, Type, TypeVar, Union

import safetensors.torch
from gluonts.core.serde import load_json
from gluonts.torch.distributions import Output
from safetensors import SafetensorError
from torch import Tensor, nn

T = TypeVar("T")

_TRUSTED_PACKAGES = ("moecast", "gluonts")
_TRUSTED_NAMES = frozenset(
    {"builtins.tuple", "builtins.list", "builtins.dict", "builtins.set", "builtins.frozenset"}
)


class ModelFolder:
    """A folder that a predictor was serialised to.

    Parameters
    ----------
    path
        The folder.
    """

    def __init__(self, path: Union[str, Path]) -> None:
        self.path = Path(path)

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    def read_predictor(self, cls: Type[T]) -> T:
        """The predictor that ``predictor.json`` describes, its weights not yet loaded.

        Raises
        ------
        ValueError
            If the folder is missing, is no model of class ``cls``, is damaged, or names a class
            that this process has not imported by itself.
        """
        description = self._read("gluonts-config.json")
        text = self._read("predictor.json")
        try:
            name = json.loads(description)["type"]
            encoded = json.loads(text)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.path} is damaged: its JSON cannot be read ({error})") from None
        expected = f"{cls.__module__}.{cls.__qualname__}"
        if name != expected:
            raise ValueError(
                f"{self.path} holds a {name}, not a {expected}: use that class's reader"
            )
        for kind, class_name in _encoded_objects(encoded):
            self._check_trusted(class_name)
            if kind != "instance":
                raise ValueError(f"{self.path}/predictor.json is damaged: it has a {kind!r} object")
        try:
            predictor = load_json(text)
        except Exception as error:
            raise ValueError(f"{self.path}/predictor.json is damaged: {error}") from error
        if not isinstance(predictor, cls):
            raise ValueError(f"{self.path}/predictor.json describes no {expected}")
        return predictor

    def load_weights(self, network: nn.Module) -> None:
        """Load the weights into a network of the shapes they were saved from.

        Raises
        ------
        ValueError
            If they are missing, damaged, or belong to another network.
        """
        try:
            weights = safetensors.torch.load_file(str(self.weights))
        except FileNotFoundError:
            raise ValueError(f"{self.path} has no file {self.weights.name!r}") from None
        except SafetensorError as error:
            raise ValueError(f"{self.weights} is damaged: {error}") from None
        load_matching(network, weights, str(self.weights))

    def _read(self, name: str) -> str:
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is no folder")
        try:
            return (self.path / name).read_text()
        except FileNotFoundError:
            raise ValueError(
                f"{self.path} is no serialised predictor: it has no {name!r}"
            ) from None
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}/{name} is damaged: it is no text") from None

    def _check_trusted(self, class_name: str) -> None:
        if class_name in _TRUSTED_NAMES:
            return
        module_name, _, name = class_name.rpartition(".")
        found = getattr(sys.modules.get(module_name), name, None)
        # A class under its own name only: a module's attributes lead anywhere, to os.system too.
        if isinstance(found, type) and found.__module__ == module_name:
            package = module_name.partition(".")[0]
            if package in _TRUSTED_PACKAGES or issubclass(found, Output):
                return
        raise ValueError(
            f"{self.path}/predictor.json names {class_name!r}, which is not imported because a "
            "file says so: import its module first if you trust it"
        )


def load_matching(network: nn.Module, weights: Any, origin: str) -> None:
    """Load a state dict, or say in one sentence which weights do not fit.

    Raises
    ------
    ValueError
        If names or shapes differ.
    """
    check_weights(_shapes(network.state_dict()), _shapes(weights), origin)
    network.load_state_dict(weights)


def check_weights(
    expected: Mapping[str, List[int]], found: Mapping[str, List[int]], origin: str
) -> None:
    """Compare names and shapes of weights.

    Raises
    ------
    ValueError
        If they differ.
    """
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    reshaped = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{what} {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unknown", unknown), ("with shape", reshaped))
        if names
    ]
    if problems:
        raise ValueError(f"the weights of {origin} do not fit the network: {'; '.join(problems)}")


def _shapes(weights: Mapping[str, Tensor]) -> Dict[str, List[int]]:
    return {name: list(tensor.shape) for name, tensor in weights.items()}


def _encoded_objects(encoded: Any) -> Iterator[Tuple[str, str]]:
    """Kind and class name of every object in GluonTS's encoding."""
    if isinstance(encoded, dict):
        if "__kind__" in encoded:
            yield str(encoded["__kind__"]), str(encoded.get("class"))
        for value in encoded.values():
            yield from _encoded_objects(value)
    elif isinstance(encoded, list):
        for value in encoded:
            yield from _encoded_objects(value)
