"""Options generated from the constructors of estimators: types, defaults and help."""

from __future__ import annotations

import inspect
import json
import re
import types
from typing import Annotated, Any, Callable, Optional, Union, get_args, get_origin

import typer
from gluonts.torch.distributions import Output
from gluonts.transform.sampler import InstanceSampler
from rich.markup import escape

from ...forecasters import MoEEstimator

# Told by the data: their frequency, and how many fields of each kind they have.
FROM_DATA = frozenset(
    {
        "freq",
        "target_dim",
        "num_feat_dynamic_real",
        "num_past_feat_dynamic_real",
        "num_feat_static_real",
        "num_feat_static_cat",
        "cardinality",
    }
)
_NAMES = {"distr_output": ["--head", "--distr-output"]}
_SHARED_PANEL = "Training and heads, for every model"
_MODEL_PANEL = "Model"


def estimator_parameters(cls: type[MoEEstimator]) -> list[inspect.Parameter]:
    """Parameters for typer, one for each argument of the constructor that text can give.

    Left out are what the data tell (`FROM_DATA`) and objects without a text form (samplers).
    Defaults are the constructor's; an optional argument whose default is not None takes `none`.
    """
    shared = inspect.signature(MoEEstimator.__init__).parameters
    help_texts = {**documented_parameters(MoEEstimator), **documented_parameters(cls)}
    parameters = []
    for parameter in inspect.signature(cls.__init__).parameters.values():
        if parameter.name == "self" or parameter.name in FROM_DATA:
            continue
        kind = _option_kind(parameter)
        if kind is None:
            continue
        annotation, settings = kind
        flags = _NAMES.get(parameter.name, [f"--{parameter.name.replace('_', '-')}"])
        if annotation in (bool, Optional[bool]):
            flags = [f"{flags[0]}/--no-{flags[0].removeprefix('--')}"]
        panel = _SHARED_PANEL if parameter.name in shared else _MODEL_PANEL
        option = typer.Option(
            *flags,
            help=escape(help_texts.get(parameter.name, "")),
            rich_help_panel=panel,
            show_default=parameter.default is not None,
            **settings,
        )
        parameters.append(
            parameter.replace(
                annotation=Annotated[annotation, option], kind=inspect.Parameter.KEYWORD_ONLY
            )
        )
    return parameters


def documented_parameters(cls: type) -> dict[str, str]:
    """What the numpydoc section Parameters of a class says of each, without markup.

    `a, b` above one text gives it to both; a text that only points to another class ("As for …")
    is left out.
    """
    lines = inspect.cleandoc(cls.__doc__ or "").splitlines()
    texts: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line, following in zip(lines, [*lines[1:], ""]):
        if following and set(following) == {"-"}:
            inside = line == "Parameters"
            names = []
        elif not inside or not line.strip() or set(line) == {"-"}:
            continue
        elif not line.startswith(" "):
            names = [name.strip() for name in line.partition(" : ")[0].split(",")]
        else:
            for name in names:
                texts[name] = f"{texts.get(name, '')} {line.strip()}".strip()
    return {
        name: _plain(text)
        for name, text in texts.items()
        if not text.startswith("As for ") and not name.startswith("*")
    }


def _plain(text: str) -> str:
    return re.sub(r":\w+:`~?([^`]+)`", r"\1", text).replace("``", "")


def _option_kind(parameter: inspect.Parameter) -> Optional[tuple[Any, dict[str, Any]]]:
    """The annotation and settings of a parameter's option; None if text cannot give it."""
    annotation = parameter.annotation
    several = get_origin(annotation) in (Union, types.UnionType)
    members = set(get_args(annotation)) if several else {annotation}
    optional = type(None) in members
    members.discard(type(None))
    if InstanceSampler in members:
        return None
    if members == {int, str, list[int]} or str(annotation).count("List[int]"):
        return Any, {"parser": _sizes, "metavar": "INTEGER,…|auto"}
    if Output in members:
        return str, {}
    (member,) = members
    if member in (bool, int, float, str):
        if optional and parameter.default is not None:
            return Any, {"parser": _or_none(member), "metavar": f"{_metavar(member)}|none"}
        return (Optional[member] if optional else member), {}
    if get_origin(member) is dict:
        return Any, {"parser": _json_object, "metavar": "JSON"}
    raise TypeError(f"no option can be made of {parameter}")


def _metavar(member: type) -> str:
    return {int: "INTEGER", float: "FLOAT", str: "TEXT"}[member]


def _or_none(member: type) -> Callable[[Any], Any]:
    def parse(text: Any) -> Any:
        if not isinstance(text, str):
            return text
        if text.lower() == "none":
            return None
        try:
            return member(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is neither {_metavar(member)} nor none.") from None

    parse.__name__ = f"{member.__name__}_or_none"
    return parse


def _sizes(text: Any) -> Any:
    """A whole number, several with commas, or a word."""
    if not isinstance(text, str):
        return text
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        return text
    return sizes if len(sizes) > 1 else sizes[0]


def _json_object(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{text!r} is no JSON: {error}.") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{text!r} is no JSON object, such as '{{\"max_epochs\": 10}}'.")
    return found
