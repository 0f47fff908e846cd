"""Heads by name, for command lines and hyperparameters."""

import ast
import difflib
from pydoc import locate
from typing import Any, Callable, Dict, Union

from gluonts.torch.distributions import Output

from .beta import BetaOutput
from .counts import NegativeBinomialOutput, PoissonOutput, ZeroInflatedNegativeBinomialOutput
from .gamma import GammaOutput
from .gaussian_copula import GaussianCopulaOutput
from .implicit_quantiles import ImplicitQuantilesOutput
from .laplace import LaplaceOutput
from .log_normal import LogNormalOutput
from .mixture import MixtureOutput
from .normal import NormalFixedScaleOutput, NormalOutput
from .pareto_tails import ParetoTailsOutput
from .point import PointOutput
from .quantile_spline import QuantileSplineOutput
from .quantiles import QuantileOutput
from .student_t import StudentTOutput
from .truncated_normal import TruncatedNormalOutput

_DECILES = [level / 10 for level in range(1, 10)]


def _mixture(*components: Any, **settings: Any) -> Output:
    return MixtureOutput(list(components), **settings)


def _moirai_mixture() -> Output:
    return MixtureOutput(
        [
            StudentTOutput(),
            NormalFixedScaleOutput(),
            NegativeBinomialOutput(real_valued=True),
            LogNormalOutput(),
        ]
    )


def _quantile(*levels: float) -> Output:
    return QuantileOutput(list(levels) or _DECILES)


def _quantile_spline(*levels: float, **settings: Any) -> Output:
    return QuantileSplineOutput(list(levels) or None, **settings)


HEADS: Dict[str, Callable[..., Output]] = {
    "beta": BetaOutput,
    "gamma": GammaOutput,
    "gaussian_copula": GaussianCopulaOutput,
    "implicit_quantiles": ImplicitQuantilesOutput,
    "laplace": LaplaceOutput,
    "log_normal": LogNormalOutput,
    "mixture": _mixture,
    "moirai_mixture": _moirai_mixture,
    "negative_binomial": NegativeBinomialOutput,
    "normal": NormalOutput,
    "normal_fixed_scale": NormalFixedScaleOutput,
    "pareto_tails": ParetoTailsOutput,
    "point": PointOutput,
    "poisson": PoissonOutput,
    "quantile": _quantile,
    "quantile_spline": _quantile_spline,
    "student_t": StudentTOutput,
    "truncated_normal": TruncatedNormalOutput,
    "zero_inflated_negative_binomial": ZeroInflatedNegativeBinomialOutput,
}


def resolve_head(head: Union[Output, str], argument: str = "distr_output") -> Output:
    """A head from itself, a short name, or the path of a class.

    A name may be followed by arguments as in Python, names among them without quotes:
    ``"normal(loss=crps)"``, ``"mixture(student_t, negative_binomial)"``,
    ``"quantile(0.1, 0.5, 0.9)"``.

    Parameters
    ----------
    head
        The head or its name.
    argument
        What it is given for, for messages.

    Raises
    ------
    ValueError
        If the name is neither short nor a class path, the class is no
        ``gluonts.torch.distributions.Output``, or its arguments are wrong.
    """
    if isinstance(head, Output):
        return head
    if not isinstance(head, str):
        raise ValueError(f"{argument}={head!r} must be a head or the name of one")
    try:
        expression = ast.parse(head.strip(), mode="eval").body
    except SyntaxError:
        raise _unknown(head, argument) from None
    return _build(expression, head, argument)


def _build(expression: ast.expr, head: str, argument: str) -> Output:
    called = expression.func if isinstance(expression, ast.Call) else expression
    name = ast.unparse(called)
    make = HEADS.get(name) or _class_at(name)
    if make is None:
        raise _unknown(name, argument)
    arguments, settings = [], {}
    if isinstance(expression, ast.Call):
        arguments = [_value(item, head, argument) for item in expression.args]
        settings = {
            str(keyword.arg): _value(keyword.value, head, argument)
            for keyword in expression.keywords
        }
    try:
        return make(*arguments, **settings)
    # GluonTS's validated constructors say with a ValueError what they lack, others with TypeErrors.
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{argument}={head!r}: {name} does not take these arguments ({reason})"
        ) from None


def _value(expression: ast.expr, head: str, argument: str) -> Any:
    """A number, a name as a string, or a head with arguments of its own."""
    if isinstance(expression, ast.Call):
        return _build(expression, head, argument)
    if isinstance(expression, (ast.Name, ast.Attribute)):
        return ast.unparse(expression)
    try:
        return ast.literal_eval(expression)
    except ValueError:
        raise ValueError(
            f"{argument}={head!r}: {ast.unparse(expression)!r} is neither a number nor a name"
        ) from None


def _class_at(path: str) -> Any:
    found = locate(path) if "." in path else None
    return found if isinstance(found, type) and issubclass(found, Output) else None


def _unknown(name: str, argument: str) -> ValueError:
    nearest = difflib.get_close_matches(name.lower(), HEADS, n=3, cutoff=0.5)
    guess = f"did you mean {' or '.join(map(repr, nearest))}? " if nearest else ""
    return ValueError(
        f"{argument}={name!r} names no head: {guess}Choose one of {', '.join(sorted(HEADS))}, or "
        "give the path of a class derived from gluonts.torch.distributions.Output"
    )
