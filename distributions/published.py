"""Heads and parameters as published MOIRAI checkpoints name them.

uni2ts stores a head as nested dictionaries of a class path (``_target_``) and arguments, and its
parameters as nested dictionaries and lists.
"""

from typing import Any, Dict, Mapping, Sequence, Tuple, Type

from torch import Tensor

from .counts import NegativeBinomialOutput
from .head import Head
from .laplace import LaplaceOutput
from .log_normal import LogNormalOutput
from .mixture import MixtureOutput
from .normal import NormalFixedScaleOutput, NormalOutput
from .student_t import StudentTOutput

_PACKAGE = "uni2ts.distribution"

_CLASSES: Dict[str, Type[Head]] = {
    "LaplaceOutput": LaplaceOutput,
    "LogNormalOutput": LogNormalOutput,
    "MixtureOutput": MixtureOutput,
    "NegativeBinomialOutput": NegativeBinomialOutput,
    "NormalFixedScaleOutput": NormalFixedScaleOutput,
    "NormalOutput": NormalOutput,
    "StudentTOutput": StudentTOutput,
}


def head_from_published(config: Mapping[str, Any]) -> Head:
    """The head that a published configuration describes.

    Raises
    ------
    ValueError
        If it names anything but the known heads; nothing is imported because a file says so.
    """
    target = config.get("_target_")
    name = str(target).rsplit(".", 1)[-1]
    if name not in _CLASSES or not str(target).startswith(f"{_PACKAGE}."):
        raise ValueError(
            f"distr_output has _target_={target!r}, which is none of the known heads: "
            + ", ".join(f"{_PACKAGE}.{known}" for known in sorted(_CLASSES))
        )
    arguments = {key: value for key, value in config.items() if key != "_target_"}
    unknown = set(arguments) - _arguments_of(name)
    if unknown:
        raise ValueError(f"distr_output has {sorted(unknown)}, which {name} does not take")
    if name == "MixtureOutput":
        components = arguments.get("components")
        if not isinstance(components, (list, tuple)) or not all(
            isinstance(part, Mapping) for part in components
        ):
            raise ValueError(f"distr_output has components={components!r}, which are no heads")
        return MixtureOutput([head_from_published(part) for part in components])
    if name == "NegativeBinomialOutput":
        return NegativeBinomialOutput(real_valued=True)
    return _CLASSES[name](**arguments)


def head_to_published(head: Head) -> Dict[str, Any]:
    """The published configuration of a head.

    Raises
    ------
    ValueError
        If the published format has no such head.
    """
    names = {cls: name for name, cls in _CLASSES.items()}
    name = names.get(type(head))
    known = not isinstance(head, NegativeBinomialOutput) or head.real_valued
    if name is None or not known or head.loss_name != "nll" or head.beta:
        raise ValueError(
            f"distr_output={type(head).__name__} with these settings has no published format: "
            "it knows " + ", ".join(sorted(_CLASSES)) + ", trained by their likelihood"
        )
    config: Dict[str, Any] = {"_target_": f"{_PACKAGE}.{name}"}
    if isinstance(head, MixtureOutput):
        config["components"] = [head_to_published(part) for part in head.components]
    if isinstance(head, NormalFixedScaleOutput):
        config["scale"] = head.scale
    return config


def parameters_to_published(head: Head, distr_args: Sequence[Tensor]) -> Dict[str, Any]:
    """A head's parameters as nested dictionaries and lists."""
    nested: Dict[str, Any] = {}
    for name, argument in zip(head.args_dim, distr_args):
        _insert(nested, name.split("."), argument)
    return nested


def parameters_from_published(head: Head, nested: Mapping[str, Any]) -> Tuple[Tensor, ...]:
    """A head's parameters, in order, from nested dictionaries and lists.

    Raises
    ------
    ValueError
        If one is missing.
    """
    found = []
    for name in head.args_dim:
        part: Any = nested
        for key in name.split("."):
            try:
                part = part[int(key) if key.isdigit() else key]
            except (KeyError, IndexError, TypeError):
                raise ValueError(f"the published parameters lack {name!r}") from None
        found.append(part)
    return tuple(found)


def _arguments_of(name: str) -> set:
    return {"MixtureOutput": {"components"}, "NormalFixedScaleOutput": {"scale"}}.get(name, set())


def _insert(nested: Dict[str, Any], path: Sequence[str], value: Tensor) -> None:
    """Insert a value at ``name`` or at ``list.position.name…``."""
    if len(path) == 1:
        nested[path[0]] = value
        return
    parts = nested.setdefault(path[0], [])
    while len(parts) <= int(path[1]):
        parts.append({})
    _insert(parts[int(path[1])], path[2:], value)
