"""Heads by name, for command lines and hyperparameters."""

from pydoc import locate
from typing import Callable, Dict, Union

from gluonts.torch.distributions import (
    LaplaceOutput,
    NegativeBinomialOutput,
    NormalOutput,
    Output,
    QuantileOutput,
)

from .point import PointOutput
from .student_t import StudentTOutput


def _deciles() -> QuantileOutput:
    return QuantileOutput(quantiles=[level / 10 for level in range(1, 10)])


HEADS: Dict[str, Callable[[], Output]] = {
    "laplace": LaplaceOutput,
    "negative_binomial": NegativeBinomialOutput,
    "normal": NormalOutput,
    "point": PointOutput,
    "quantile": _deciles,
    "student_t": StudentTOutput,
}


def resolve_head(head: Union[Output, str]) -> Output:
    """A head from itself, a short name, or the path of a class without required arguments.

    Raises
    ------
    ValueError
        If the name is neither short nor a class path, or the class is no
        ``gluonts.torch.distributions.Output`` or needs arguments.
    """
    if isinstance(head, Output):
        return head
    if not isinstance(head, str):
        raise ValueError(f"distr_output={head!r} must be a head or the name of one")
    if head in HEADS:
        return HEADS[head]()
    cls = locate(head) if "." in head else None
    if not (isinstance(cls, type) and issubclass(cls, Output)):
        raise ValueError(
            f"distr_output={head!r} names no head: choose one of {', '.join(sorted(HEADS))}, "
            "or give the path of a class derived from gluonts.torch.distributions.Output"
        )
    try:
        return cls()
    # GluonTS's validated constructors say with a ValueError what they lack, others with TypeErrors.
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"distr_output={head!r} needs arguments ({reason}): give the object itself, or its "
            "arguments as GluonTS hyperparameters, 'distr_output.()' and 'distr_output.<name>'"
        ) from None
