"""Distribution heads: from a network's outputs to parameters, a loss, quantiles and forecasts."""

from .names import HEADS, resolve_head
from .parameters import ParameterHead, has_cdf, scales_parameters, scaling_for, support_of
from .point import PointOutput
from .student_t import StudentTOutput

__all__ = [
    "HEADS",
    "ParameterHead",
    "PointOutput",
    "StudentTOutput",
    "has_cdf",
    "resolve_head",
    "scales_parameters",
    "scaling_for",
    "support_of",
]
