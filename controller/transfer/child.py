"""The process that builds one pack: one order in, one reply out, then it ends.

    python -I -m controller.transfer.child

The order comes as one line of JSON on standard input, which then stays open: when it ends, the parent is gone, and so
is this process. The reply is one line of JSON on standard output. Memory, processor time and file size are bounded, and
everything else on the machine goes first. `builder` is the other side.
"""

import os
import resource
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from controller.transfer.encoding import VariantFiles, build_delta, build_full
from controller.transfer.packs import PackFile, PackId
from core.digest import Digest
from core.errors import IntegrityError, InvalidManifest
from core.manifest import parse_manifest

MAX_REPLY_BYTES = 1 << 16
_NICE = 10


@dataclass(frozen=True, slots=True)
class Limits:
    # Private memory that can be written (RLIMIT_DATA); mapped files do not count.
    memory_bytes: int
    cpu_s: int
    # Largest file that may be written.
    file_bytes: int


@dataclass(frozen=True, slots=True)
class Side:
    """A variant: its manifest's bytes as text, and where its files are."""

    digest: str
    manifest: str
    paths: dict[str, Path]


@dataclass(frozen=True, slots=True)
class Order:
    limits: Limits
    # Where the packs are; a delta needs the full one.
    root: Path
    # The new file to write.
    target: Path
    variant: Side
    # None: in full.
    source: Side | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """How it ended: a refusal is the text of an error that a person can act on."""

    refusal: str | None = None


ORDER: TypeAdapter[Order] = TypeAdapter(Order)
REPLY: TypeAdapter[Reply] = TypeAdapter(Reply)


def main() -> None:
    order = ORDER.validate_json(sys.stdin.buffer.readline())
    _limit(order.limits)
    os.nice(_NICE)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    sys.stdout.buffer.write(REPLY.dump_json(_answer(order)))
    sys.stdout.buffer.flush()


def _limit(limits: Limits) -> None:
    for what, bound in (
        (resource.RLIMIT_DATA, limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        allowed = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(what, (allowed, allowed))


def _end_with_parent() -> None:
    # Not through sys.stdin: a thread that holds its lock makes the interpreter abort at exit.
    while os.read(0, 1):
        pass
    os._exit(1)


def _answer(order: Order) -> Reply:
    try:
        _build(order)
    except (IntegrityError, InvalidManifest) as error:
        return Reply(str(error))
    except OSError as error:
        return Reply(f"disk: {error.strerror or error}; free some space and try again")
    return Reply()


def _build(order: Order) -> None:
    variant = _files(order.variant)
    if order.source is None:
        build_full(variant, order.target)
        return
    full = PackFile.open(order.root, PackId(variant.digest))
    try:
        build_delta(variant, _files(order.source), full, order.target)
    finally:
        full.close()


def _files(side: Side) -> VariantFiles:
    return VariantFiles(Digest(side.digest), parse_manifest(side.manifest.encode()), side.paths)


if __name__ == "__main__":
    main()
