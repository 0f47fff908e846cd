"""The one exception that evaluation raises on purpose."""


class EvaluationError(ValueError):
    """Data or settings that cannot be used.

    The message is one sentence that names the field or file, the value and the remedy, so that the
    command line can print it as it is.
    """


class DataWarning(UserWarning):
    """Data that were repaired on reading: the message says what was found and what was done."""
