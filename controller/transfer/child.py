"""The process that builds one pack: one order in, one reply out, then it ends.

    python -I -m controller.transfer.child

Order and reply are JSON. Memory, processor time and file size are bounded (see `controller.children`), and everything
else on the machine goes first. `builder` is the other side.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from controller.children.confinement import Limits, confine, send_reply, take_order, take_reply_pipe
from controller.transfer.encoding import VariantFiles, build_delta, build_full
from controller.transfer.packs import PackFile, PackId
from core.digest import Digest
from core.errors import IntegrityError, InvalidManifest
from core.manifest import parse_manifest

MAX_REPLY_BYTES = 1 << 16
_NICE = 10


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
    pipe = take_reply_pipe()
    order = ORDER.validate_json(take_order())
    confine(order.limits)
    os.nice(_NICE)
    send_reply(pipe, REPLY.dump_json(_answer(order)))


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
