"""What is made of weights, kept for as long as the weights live and do not change."""

import weakref
from typing import Any, Callable, Dict, Hashable, List, NamedTuple, Sequence, Tuple, TypeVar

from torch import Tensor

T = TypeVar("T")


class _Kept(NamedTuple):
    state: Tuple[Hashable, ...]
    finalizers: List[weakref.finalize]
    value: Any


class WeightCache:
    """Keeps what was made of tensors, by the tensors' identity.

    Parameters
    ----------
    release
        Called with what is kept no longer: because a tensor changed or is gone, or the cache is
        emptied.
    """

    def __init__(self, release: Callable[[Any], None]) -> None:
        self._release = release
        self._kept: Dict[Hashable, _Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, sources: Sequence[Tensor], purpose: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returns, called only if it was not before or a source changed since.

        Parameters
        ----------
        sources
            The tensors that ``make`` reads.
        purpose
            Tells apart what is made of the same tensors.
        make
            Makes it.
        """
        key = (purpose, *map(id, sources))
        state = tuple(_state(source) for source in sources)
        kept = self._kept.get(key)
        if kept is not None and kept.state != state:
            self._drop(key)
            kept = None
        if kept is None:
            value = make()
            finalizers = [weakref.finalize(source, self._drop, key) for source in sources]
            for finalizer in finalizers:
                finalizer.atexit = False
            kept = self._kept[key] = _Kept(state, finalizers, value)
        return kept.value

    def clear(self) -> None:
        """Release everything."""
        for key in list(self._kept):
            self._drop(key)

    def _drop(self, key: Hashable) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            for finalizer in kept.finalizers:
                finalizer.detach()
            self._release(kept.value)


def _state(tensor: Tensor) -> Tuple[Hashable, ...]:
    """Differs from before once the tensor's numbers were changed in place or replaced."""
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr(), tuple(tensor.shape), tensor.dtype, tensor.device
