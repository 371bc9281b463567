"""What a variant takes when it is loaded, measured where it does no harm and remembered on disk.

A figure belongs to a manifest's digest and to the conditions it was measured under: another ONNX Runtime, another batch
or another number of threads measures again. A file that cannot be read or written is no reason to stop: what it said is
measured again.
"""

import asyncio
import logging
import math
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, Self

import orjson

from core.atomic_files import write_atomically
from core.digest import Digest
from core.errors import InvalidRequest
from core.manifest import Manifest
from edge_agent.settings import RuntimeSettings

_log = logging.getLogger(__name__)

# Chosen: more variants than a machine ever holds; the oldest figures go first.
MAX_REMEMBERED = 512
# Derived: the file as read, its graph, the weights as tensors and as the kernels want them.
_COPIES = 4
_ESTIMATED_BYTES_PER_S = 50e6


@dataclass(frozen=True, slots=True)
class Footprint:
    """Resident memory of a variant once it is warm, with its largest batch, and at the worst moment of its load."""

    resident_bytes: int
    peak_bytes: int
    load_s: float

    @classmethod
    def parse(cls, document: object) -> Self:
        """Return the footprint of a JSON object.

        Raises:
            InvalidRequest: it is none.
        """
        match document:
            case {"resident_bytes": int(resident), "peak_bytes": int(peak), "load_s": int() | float() as load_s} if (
                resident >= 0 and peak >= 0 and load_s >= 0 and math.isfinite(load_s)
            ):
                return cls(resident, max(peak, resident), float(load_s))
        raise InvalidRequest("footprint: expected resident_bytes, peak_bytes and load_s, none of them negative")

    def document(self) -> Mapping[str, Any]:
        return asdict(self)


def estimated(manifest: Manifest) -> Footprint:
    """Return what a variant takes at most, by the size of its files: where it could not be measured."""
    most_bytes = _COPIES * manifest.size_bytes
    return Footprint(most_bytes, most_bytes, manifest.size_bytes / _ESTIMATED_BYTES_PER_S)


class Scales(Protocol):
    """Loads a variant in a process of its own."""

    async def measure(self, manifest: Manifest, folder: Path) -> Footprint | None:
        """Return what was measured; None when it could not be."""
        ...


class Footprints:
    """Every figure by digest; `path` None: for the life of this process."""

    def __init__(self, path: Path | None = None, *, conditions: str = "", disk: Executor | None = None) -> None:
        self._path = path
        self._conditions = conditions
        self._disk = disk
        self._known = {} if path is None else _read(path, conditions)

    @classmethod
    def under(cls, path: Path, runtime: RuntimeSettings, *, disk: Executor) -> Self:
        """Return the figures in `path` that were measured under the conditions of this agent."""
        conditions = (
            f"onnxruntime {version('onnxruntime')}, {runtime.intra_op_threads} threads, batches of {runtime.max_batch}"
        )
        return cls(path, conditions=conditions, disk=disk)

    def get(self, digest: Digest) -> Footprint | None:
        return self._known.get(digest)

    async def remember(self, digest: Digest, footprint: Footprint) -> None:
        self._known.pop(digest, None)
        self._known[digest] = footprint
        while len(self._known) > MAX_REMEMBERED:
            del self._known[next(iter(self._known))]
        if self._path is not None:
            content = self._encoded()
            await asyncio.get_running_loop().run_in_executor(self._disk, _write, self._path, content)

    def _encoded(self) -> bytes:
        figures = {digest: footprint.document() for digest, footprint in self._known.items()}
        return orjson.dumps({"conditions": self._conditions, "footprints": figures}, option=orjson.OPT_INDENT_2)


def _read(path: Path, conditions: str) -> dict[Digest, Footprint]:
    try:
        document = orjson.loads(path.read_bytes())
        if document["conditions"] != conditions:
            _log.info("models are measured again", extra={"was": str(document["conditions"])[:200], "is": conditions})
            return {}
        return {Digest(digest): Footprint.parse(figure) for digest, figure in document["footprints"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InvalidRequest) as error:
        _log.warning("measured sizes are lost; models are measured again", extra={"reason": str(error)[:200]})
        return {}


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        _log.warning("measured sizes are not kept", extra={"reason": error.strerror or str(error)})
