"""The chunk store under any interleaving of writes, crashes, rot and collections: what is published is what it says."""

import random
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.chunks import ChunkRef, chunk_digest
from core.digest import Digest, digest_of_file, hex_of
from edge_agent.sync.store import ContentStore
from edge_agent.sync.worklist import Worklist
from tests.support.delivery_shelf import chunk_contents
from tests.support.variants import MadeVariant, made_variant

CHUNK_BYTES = 16
WEIGHTS = random.Random(1).randbytes(5 * CHUNK_BYTES + 3)
VARIANTS = (
    made_variant({"model.onnx": b"graph", "w.bin": WEIGHTS}, chunk_bytes=CHUNK_BYTES),
    # Shares a file with the first at other positions, repeats itself, and has the same file twice.
    made_variant(
        {"a.onnx": b"0123456789abcdef" * 3, "b.bin": WEIGHTS, "c.bin": WEIGHTS, "empty": b""},
        version=2,
        chunk_bytes=CHUNK_BYTES,
    ),
    # The same file, cut otherwise.
    made_variant({"model.onnx": b"graph", "w.bin": WEIGHTS}, version=3, chunk_bytes=24),
)
variants = st.sampled_from(VARIANTS)
choices = st.integers(0, 10**6)


class ChunkStoreMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="nanofleet-store-"))
        self.work: dict[Digest, Worklist] = {}
        self.pinned: Digest | None = None
        self.store = ContentStore(self.root)

    def teardown(self) -> None:
        self._abandon()
        shutil.rmtree(self.root)

    def _worklist(self, variant: MadeVariant) -> Worklist:
        """Begin, or go on with, an attempt on a variant as Delivery does."""
        if variant.digest not in self.work:
            # One variant at a time: an attempt on another ends this one.
            self._abandon()
            self.store.put(variant.digest, variant.blobs[variant.digest])
            work = self.work[variant.digest] = Worklist(variant.manifest, self.store)
            for assembly in work.assemblies.values():
                assembly.allocate()
            for ref in work.doubtful():
                work.recheck(ref)
        return self.work[variant.digest]

    def _abandon(self) -> None:
        for work in self.work.values():
            work.close()
        self.work.clear()

    @rule(variant=variants, choice=choices)
    def bring_a_chunk(self, variant: MadeVariant, choice: int) -> None:
        ref, content = self._some_chunk(variant, choice)
        if ref is not None:
            self._worklist(variant).put(ref, content)

    @rule(variant=variants, choice=choices)
    def die_while_a_chunk_is_written(self, variant: MadeVariant, choice: int) -> None:
        ref, content = self._some_chunk(variant, choice)
        if ref is not None:
            self._worklist(variant)
            with (self.root / "partial" / hex_of(Digest(ref.file.digest))).open("r+b") as part:
                part.seek(ref.offset)
                part.write(content[: choice % (len(content) + 1)])
            self.crash()

    @rule()
    def crash(self) -> None:
        """Start again on what is on the disk."""
        self._abandon()
        self.pinned = None
        self.store = ContentStore(self.root)

    @rule(choice=choices)
    def lose_power_and_what_was_not_durable(self, choice: int) -> None:
        """Files that were not published may come back with anything in them."""
        for part in (self.root / "partial").iterdir():
            content = bytearray(part.read_bytes())
            if content:
                at = choice % len(content)
                content[at : at + CHUNK_BYTES] = bytes(len(content[at : at + CHUNK_BYTES]))
                part.write_bytes(content)
        self.crash()

    @rule(variant=variants)
    def publish_what_is_whole(self, variant: MadeVariant) -> None:
        work = self._worklist(variant)
        if not work.missing():
            for digest in work.assemblies:
                self.store.publish(digest)
            self._abandon()
            assert self.store.is_complete(variant.digest)

    @rule(variant=variants)
    def bring_all_that_is_missing(self, variant: MadeVariant) -> None:
        work, contents = self._worklist(variant), chunk_contents(variant)
        for ref in work.missing():
            work.put(ref, contents[ref.index])
        self.publish_what_is_whole(variant)

    @rule(keep=st.sets(variants.map(lambda variant: variant.digest)))
    def collect(self, keep: set[Digest]) -> None:
        complete = {variant.digest for variant in VARIANTS if self.store.is_complete(variant.digest)}
        kept = keep if self.pinned is None else {*keep, self.pinned}
        with self.store.pinned([] if self.pinned is None else [self.pinned]):
            self.store.remove_unneeded(keep=keep)
        self._abandon()
        assert {variant.digest for variant in VARIANTS if self.store.is_complete(variant.digest)} >= complete & kept
        needed = {hex_of(digest) for variant in VARIANTS if variant.digest in kept for digest in variant.blobs}
        assert {path.name for folder in ("blobs", "partial") for path in (self.root / folder).iterdir()} <= needed

    @rule(variant=variants)
    def pin(self, variant: MadeVariant) -> None:
        self.pinned = variant.digest

    @precondition(lambda self: self.pinned is not None)
    @rule()
    def unpin(self) -> None:
        self.pinned = None

    def _some_chunk(self, variant: MadeVariant, choice: int) -> tuple[ChunkRef | None, bytes]:
        missing = self._worklist(variant).missing()
        if not missing:
            return None, b""
        ref = missing[choice % len(missing)]
        return ref, chunk_contents(variant)[ref.index]

    @invariant()
    def what_is_published_is_what_it_says(self) -> None:
        if hasattr(self, "store"):
            for blob in (self.root / "blobs").iterdir():
                assert digest_of_file(blob) == f"sha256:{blob.name}"

    @invariant()
    def nothing_counts_that_is_not_here(self) -> None:
        for work in getattr(self, "work", {}).values():
            for assembly in work.assemblies.values():
                held = [ref for ref in assembly.chunks if ref not in assembly.missing]
                content = (self.root / "partial" / hex_of(Digest(assembly.file.digest))).read_bytes()
                for ref in held:
                    assert chunk_digest(content[ref.offset : ref.offset + ref.size_bytes]) == ref.digest


ChunkStoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestChunkStore = ChunkStoreMachine.TestCase
