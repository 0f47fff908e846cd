"""What a computation asks of the device."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Iterator

from .device import the_device


@dataclass
class Counts:
    """Device programs started, and tensors copied to the device and from it."""

    programs: int = 0
    uploads: int = 0
    downloads: int = 0


@contextmanager
def counted() -> Iterator[Counts]:
    """Count what is done inside, which is complete once it is left.

    Nothing is replayed from traces meanwhile, so that every program shows.

    Examples
    --------
    >>> with counted() as counts:  # doctest: +SKIP
    ...     network.outputs(inputs)
    >>> counts  # doctest: +SKIP
    Counts(programs=13, uploads=1, downloads=1)
    """
    counts = Counts()
    with the_device().without_traces():
        # The library keeps a record of what it does, of which this is the public form.
        import ttnn

        ttnn.graph.begin_graph_capture(ttnn.graph.RunMode.NORMAL)
        try:
            yield counts
        finally:
            record = ttnn.graph.end_graph_capture()
    for node in record:
        name = (node.get("params") or {}).get("name")
        counts.programs += node["node_type"] == "program_execution"
        if node["node_type"] == "function_start":
            counts.uploads += name == "Tensor::to_device"
            counts.downloads += name == "Tensor::cpu"
