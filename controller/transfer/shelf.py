"""`PackShelf`: the packs under one folder, built when somebody prepares a delivery and read chunk by chunk.

    full/<target>   delta/<target>/<source>   tmp/

One pack is built at a time, and whoever asks for one that is being built waits for it. A pack that proves damaged is
dropped, so that the next preparation builds it again. After each build the packs that nobody used for longest go, until
all of them fit into `max_bytes`. Reading happens on one thread of the shelf's own, which also owns the open files; a
bounded number of them stays open.
"""

import asyncio
import logging
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from controller.transfer.builder import TEMPORARIES
from controller.transfer.model import Codec, Encoded, Sizes
from controller.transfer.packs import Form, PackFile, PackId
from core.chunks import chunks_of
from core.digest import Digest, hex_of
from core.errors import IntegrityError, NotFound, Unavailable
from core.manifest import Manifest

T = TypeVar("T")

# Chosen: a model's versions under delivery at a time, each with the deltas to what a fleet holds.
_MAX_OPEN = 64
# Chosen: some hundred variants of the size that agents run, with their deltas.
MAX_PACKS_BYTES = 16 << 30
_CODECS = {Form.RAW: Codec.RAW, Form.ZSTD: Codec.ZSTD, Form.DIFFERENCE: Codec.DIFFERENCE}

_log = logging.getLogger(__name__)


class Builder(Protocol):
    async def build(self, variant: Manifest, source: Manifest | None = None) -> None:
        """Build the pack of `variant`, in full or from `source`, under its name."""
        ...


class _Best(NamedTuple):
    """The smallest form of a chunk: read `pack`; `delta` is the one that says so, None when none does."""

    size_bytes: int
    pack: PackId
    delta: PackId | None
    form: Form
    source_index: int


class PackShelf:
    """Implements `controller.transfer.model.Packs`. Call `clean` once before use and `close` at the end."""

    def __init__(self, root: Path, builder: Builder, *, max_bytes: int = MAX_PACKS_BYTES) -> None:
        self._root = root
        self._builder = builder
        self._max_bytes = max_bytes
        self._building = asyncio.Lock()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="packs")
        # Touched by the reader's thread only, newest use last.
        self._open: OrderedDict[PackId, PackFile] = OrderedDict()

    async def clean(self) -> None:
        """Make the folders, and remove what an interrupted process left half written."""
        await self._read(self._clean)

    async def close(self) -> None:
        await self._read(self._close_all)
        await asyncio.to_thread(self._reader.shutdown)

    async def prepare(self, to: Manifest, held: Collection[Manifest]) -> None:
        """Have the packs of `to` built, in full and from each of `held`; see `Packs`."""
        chunks_of(to)
        target = await asyncio.to_thread(to.digest)
        await self._build(PackId(target), to, None)
        for source in held:
            if (digest := await asyncio.to_thread(source.digest)) != target:
                await self._build(PackId(target, digest), to, source)

    async def encoded(self, to: Digest, index: int, held: Sequence[Digest]) -> Encoded:
        """Return a chunk in the smallest form that a holder of `held` can decode; see `Packs`."""
        return await self._read(lambda: self._encoded(to, index, held))

    async def sizes(self, to: Digest, held: Sequence[Digest]) -> Sizes:
        """Return what a holder of `held` would be sent; see `Packs`."""
        return await self._read(lambda: self._sizes(to, held))

    async def _build(self, pack: PackId, to: Manifest, source: Manifest | None) -> None:
        # One at a time, whoever asks: a build takes a core and the disk. Who waited finds it built.
        async with self._building:
            if await self._read(lambda: self._is_built(pack)):
                return
            started_s = time.monotonic()
            await self._builder.build(to, source)
            await self._read(lambda: self._make_room(pack.target))
            seconds = round(time.monotonic() - started_s, 3)
            fields = {"model": to.model, "version": to.version, "variant": to.variant, "seconds": seconds}
            _log.info("pack built", extra=fields | {"source_version": None if source is None else source.version})

    # ---- on the reader's thread ---------------------------------------------------------------------------------

    def _clean(self) -> None:
        shutil.rmtree(self._root / TEMPORARIES, ignore_errors=True)
        (self._root / TEMPORARIES).mkdir(parents=True)

    def _close_all(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def _is_built(self, pack: PackId) -> bool:
        try:
            return self._find(pack) is not None
        except IntegrityError:
            return False  # Dropped by now.

    def _encoded(self, to: Digest, index: int, held: Sequence[Digest]) -> Encoded:
        best = self._best(to, index, held)
        pack = self._required(best.pack)
        try:
            data = pack.read(index)
        except IntegrityError:
            self._drop(best.pack)
            raise
        is_difference = best.form is Form.DIFFERENCE
        return Encoded(
            _CODECS[best.form],
            data,
            source_manifest=best.pack.source if is_difference else None,
            source_index=best.source_index if is_difference else 0,
            is_delta=best.delta is not None,
        )

    def _best(self, to: Digest, index: int, held: Sequence[Digest]) -> _Best:
        """Return the smallest form; between equals that of a delta, which a metered agent may be sent."""
        in_full = PackId(to)
        full = self._required(in_full)
        if not 0 <= index < len(full):
            raise NotFound(f"chunk {index} of {to}: expected one of {len(full)}")
        whole = full.entry(index)
        best = _Best(whole.size_bytes, in_full, None, whole.form, 0)
        for pack, delta in self._deltas(to, held, count=len(full)):
            entry = delta.entry(index)
            if entry.form is Form.FULL and best.delta is None:
                best = best._replace(delta=pack)
            elif entry.form is Form.DIFFERENCE and entry.size_bytes < best.size_bytes:
                best = _Best(entry.size_bytes, pack, pack, entry.form, entry.source_index)
        return best

    def _sizes(self, to: Digest, held: Sequence[Digest]) -> Sizes:
        full = self._required(PackId(to))
        full_sizes = full.encoded_sizes
        wire = full_sizes.copy()
        has_delta = False
        for _, delta in self._deltas(to, held, count=len(full)):
            has_delta = True
            wire[delta.has(Form.SAME)] = 0
            coded = delta.has(Form.DIFFERENCE)
            wire[coded] = wire[coded].clip(max=delta.encoded_sizes[coded])
        return Sizes(int(wire.sum()), int(full_sizes.sum()), full.plain_bytes, has_delta)

    def _deltas(self, to: Digest, held: Sequence[Digest], *, count: int) -> list[tuple[PackId, PackFile]]:
        """Return the deltas to `to` that are built and worth it."""
        packs = [PackId(to, source) for source in held]
        found = [(pack, delta) for pack in packs if (delta := self._find(pack)) is not None]
        return [(pack, delta) for pack, delta in found if not delta.is_useless and len(delta) == count]

    def _required(self, pack: PackId) -> PackFile:
        found = self._find(pack)
        if found is None:
            raise NotFound(f"variant {pack.target}: not prepared for delivery; prepare it first")
        return found

    def _find(self, pack: PackId) -> PackFile | None:
        """Return the open pack; None when it is not built."""
        if pack not in self._open:
            try:
                self._open[pack] = PackFile.open(self._root, pack)
                # Its time of change says when it was last of use.
                os.utime(pack.path(self._root))
            except FileNotFoundError:
                return None
            except IntegrityError:
                self._drop(pack)
                raise
            # Those of the variant at hand are the newest, so they stay: an agent holds at most 16 others.
            if len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(pack)
        return self._open[pack]

    def _make_room(self, target: Digest) -> None:
        """Remove the packs used longest ago until the rest fits; those of `target` stay: they are about to be used."""
        found = [(path, path.stat()) for path in self._root.glob("full/*")]
        found += [(path, path.stat()) for path in self._root.glob("delta/*/*")]
        total_bytes = sum(stat.st_size for _, stat in found)
        for path, stat in sorted(found, key=lambda each: each[1].st_mtime):
            if total_bytes <= self._max_bytes:
                return
            if hex_of(target) not in (path.name, path.parent.name):
                total_bytes -= stat.st_size
                # One that is open stays readable until it is closed.
                path.unlink()

    def _drop(self, pack: PackId) -> None:
        _log.warning("a damaged pack is dropped", extra={"target": pack.target, "source": pack.source})
        opened = self._open.pop(pack, None)
        if opened is not None:
            opened.close()
        pack.path(self._root).unlink(missing_ok=True)

    async def _read(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, work)
        except OSError as error:
            raise Unavailable(f"disk: {error.strerror or error}; free some space and try again") from error
