"""Responses of one model by everything that was asked: bounded in bytes, those that were not used for longest go first.

The key is kept whole and compared whole, so two requests never share an answer because their hashes are equal. Keys
count like the responses: for most models the inputs are the larger part. Holding nothing else of anybody, it is a plain
value store; what may go in and come out is decided in `edge_agent.cached_answers`.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from core.open_inference.messages import InferResponse
from core.tensors import Datatype, Tensor
from edge_agent.cascade.policy import Reason
from edge_agent.request_content import Content

# Measured (CPython 3.11): with these and the contents, what is counted is a little more than what is allocated.
ENTRY_BYTES = 950
OBJECT_BYTES = 48


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer of the edge, as it was given; its arrays are copies that nobody changes."""

    response: InferResponse
    reason: Reason
    confidence: float | None


class ResponseCache:
    def __init__(self, *, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self.size_bytes = 0
        self._entries: OrderedDict[Content, tuple[Kept, int]] = OrderedDict()

    def find(self, key: Content) -> Kept | None:
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Content, kept: Kept) -> None:
        """Store an answer, unless it takes more than all that there is."""
        size_bytes = _size_of(key) + _outputs_bytes(kept.response.outputs) + ENTRY_BYTES
        if size_bytes > self.max_bytes:
            return
        self._drop(key)
        self._entries[key] = kept, size_bytes
        self.size_bytes += size_bytes
        while self.size_bytes > self.max_bytes:
            self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        self._entries.clear()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def _drop(self, key: Content) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.size_bytes -= entry[1]


def _size_of(part: object) -> int:
    """Return the bytes of a key and of the objects that it consists of; texts are mostly somebody else's."""
    if isinstance(part, tuple):
        return sum(map(_size_of, part)) + OBJECT_BYTES
    return len(part) + OBJECT_BYTES if isinstance(part, bytes) else 0


def _outputs_bytes(outputs: Iterable[Tensor]) -> int:
    return sum(_tensor_bytes(tensor) for tensor in outputs)


def _tensor_bytes(tensor: Tensor) -> int:
    if tensor.datatype is Datatype.BYTES:
        return sum(len(element) + OBJECT_BYTES for element in tensor.array.ravel().tolist())
    return tensor.array.nbytes
