"""The spool of spans: in order, bounded, whole after any death, and damage costs the record that it hit."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from controller.traces.segment import HEAD_BYTES, MAGIC, Head
from controller.traces.spool import Spool, SpoolBounds, Taken

WIDE = SpoolBounds(max_bytes=1 << 20, max_age_s=3600.0)
APPENDER = """
import sys
from pathlib import Path
from controller.traces.spool import Spool, SpoolBounds
spool = Spool(Path(sys.argv[1]), SpoolBounds(64 << 20, 3600.0))
number = 0
while True:
    spool.append(b"%09d" % number + b"." * (number % 9000), spans=1, now_s=100.0)
    print(number, flush=True)
    number += 1
"""


def spooled(folder: Path, *payloads: bytes, bounds: SpoolBounds = WIDE) -> Spool:
    spool = Spool(folder, bounds)
    for payload in payloads:
        spool.append(payload, spans=1, now_s=100.0)
    return spool


def first_of(spool: Spool, now_s: float = 100.0) -> Taken | None:
    return next(iter(spool.take(now_s)), None)


def drained(spool: Spool, now_s: float = 100.0) -> list[bytes]:
    payloads = []
    while (taken := first_of(spool, now_s)) is not None:
        payloads.append(taken.payload)
        spool.done(taken)
    return payloads


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.spool"))


def test_records_come_in_order_and_once(tmp_path: Path) -> None:
    spool = spooled(tmp_path, b"one", b"two", b"three")
    assert drained(spool) == [b"one", b"two", b"three"]
    spool.append(b"four", spans=1, now_s=100.0)
    assert drained(spool) == [b"four"]
    assert spool.waiting_bytes == 0


def test_a_record_is_given_again_until_it_is_done(tmp_path: Path) -> None:
    spool = spooled(tmp_path, b"one", b"two")
    first = first_of(spool)
    assert first is not None
    assert first_of(spool) == first
    spool.done(first)
    second = first_of(spool)
    assert second is not None
    assert second.payload == b"two"


def test_records_are_taken_together_up_to_a_size_and_done_apart(tmp_path: Path) -> None:
    spool = spooled(tmp_path, b"a" * 40, b"b" * 40, b"c" * 40)
    both = spool.take(100.0, max_bytes=100)
    assert [taken.payload[:1] for taken in both] == [b"a", b"b"]
    spool.done(both[0])
    assert spool.take(100.0, max_bytes=100) == both[1:]
    spool.close()
    assert [payload[:1] for payload in drained(Spool(tmp_path, WIDE))] == [b"b", b"c"]


def test_what_was_not_done_comes_again_after_a_restart(tmp_path: Path) -> None:
    spool = spooled(tmp_path, b"one", b"two", b"three")
    first = first_of(spool)
    assert first is not None
    spool.done(first)
    spool.take(100.0)
    spool.close()
    assert drained(Spool(tmp_path, WIDE)) == [b"two", b"three"]


def test_the_last_record_taken_and_not_done_survives_an_orderly_end(tmp_path: Path) -> None:
    spool = spooled(tmp_path, b"one")
    spool.take(100.0)
    spool.close()
    assert drained(Spool(tmp_path, WIDE)) == [b"one"]


def test_what_is_done_leaves_nothing_on_disk(tmp_path: Path) -> None:
    spool = spooled(tmp_path, b"one", b"two")
    drained(spool)
    spool.close()
    assert files_of(tmp_path) == []


def test_over_the_bound_the_oldest_are_shed_and_counted(tmp_path: Path) -> None:
    bounds = SpoolBounds(max_bytes=8 * (HEAD_BYTES + 100), max_age_s=3600.0)
    spool = Spool(tmp_path, bounds)
    for number in range(20):
        spool.append(b"%03d" % number * 33 + b".", spans=2, now_s=100.0)
        assert sum(path.stat().st_size for path in files_of(tmp_path)) <= bounds.max_bytes
    left = drained(spool)
    assert [payload[:3] for payload in left] == [b"%03d" % number for number in range(20 - len(left), 20)]
    assert len(left) >= 7
    assert spool.shed_spans == 2 * (20 - len(left))


def test_a_record_larger_than_the_bound_is_shed_and_costs_no_other(tmp_path: Path) -> None:
    spool = spooled(tmp_path, b"one", bounds=SpoolBounds(max_bytes=1000, max_age_s=3600.0))
    spool.append(b"." * 1000, spans=7, now_s=100.0)
    assert spool.shed_spans == 7
    assert drained(spool) == [b"one"]


def test_what_is_too_old_is_shed_and_counted(tmp_path: Path) -> None:
    spool = spooled(tmp_path, b"one", b"two")
    spool.append(b"three", spans=1, now_s=3000.0)
    assert drained(spool, now_s=3750.0) == [b"three"]
    assert spool.shed_spans == 2


def test_a_record_that_waits_too_long_in_its_takers_hand_is_shed(tmp_path: Path) -> None:
    spool = spooled(tmp_path, b"one")
    spool.take(100.0)
    assert spool.take(100.0 + WIDE.max_age_s + 1) == ()
    assert spool.shed_spans == 1


@pytest.mark.parametrize("at", [0, 6, 20, HEAD_BYTES - 1, HEAD_BYTES, HEAD_BYTES + 40])
def test_a_damaged_byte_costs_its_record_only(tmp_path: Path, at: int) -> None:
    spool = spooled(tmp_path, b"a" * 50, b"b" * 50, b"c" * 50)
    spool.close()
    (path,) = files_of(tmp_path)
    content = bytearray(path.read_bytes())
    content[HEAD_BYTES + 50 + at] ^= 0x55
    path.write_bytes(content)
    spool = Spool(tmp_path, WIDE)
    assert drained(spool) == [b"a" * 50, b"c" * 50]
    assert spool.damaged_records == 1


def test_a_torn_end_costs_its_record_only(tmp_path: Path) -> None:
    spool = spooled(tmp_path, b"a" * 50, b"b" * 50)
    spool.close()
    (path,) = files_of(tmp_path)
    os.truncate(path, path.stat().st_size - 10)
    spool = Spool(tmp_path, WIDE)
    spool.append(b"c", spans=1, now_s=100.0)
    assert drained(spool) == [b"a" * 50, b"c"]
    assert spool.damaged_records == 1


def test_a_payload_that_looks_like_a_head_is_a_payload(tmp_path: Path) -> None:
    posing = Head.of(b"forged", spans=1, at_s=100.0).to_bytes() + b"forged"
    assert drained(spooled(tmp_path, MAGIC * 10, posing, b"last")) == [MAGIC * 10, posing, b"last"]


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    spool = spooled(tmp_path, b"one")
    assert drained(spool) == [b"one"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path: Path) -> None:
    room = [1 << 20]

    def write(file: int, content: bytes) -> int:
        written = os.write(file, content[: room[0]])
        room[0] -= written
        if not written:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written

    spool = Spool(tmp_path, WIDE, write=write)
    spool.append(b"one", spans=1, now_s=100.0)
    room[0] = HEAD_BYTES + 10
    with pytest.raises(OSError, match="No space left"):
        spool.append(b"." * 100, spans=1, now_s=100.0)
    room[0] = 1 << 20
    spool.append(b"two", spans=1, now_s=100.0)
    assert drained(spool) == [b"one", b"two"]
    assert spool.damaged_records == 0


def test_every_record_that_was_appended_outlives_a_killed_process(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", APPENDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(200):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    appended = 200 + len(process.stdout.read().splitlines())
    process.stdout.close()
    process.wait(10)
    numbers = [int(payload[:9]) for payload in drained(Spool(tmp_path, SpoolBounds(64 << 20, 3600.0)))]
    assert numbers == list(range(len(numbers)))
    # One may have been appended whose number was never told.
    assert len(numbers) - appended in {0, 1}


@settings(max_examples=60, deadline=None)
@given(
    payloads=st.lists(st.binary(max_size=60) | st.just(MAGIC * 12), min_size=1, max_size=12),
    done=st.integers(0, 12),
    place=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
)
def test_any_damaged_byte_costs_one_record_at_most(payloads: list[bytes], done: int, place: float, flip: int) -> None:
    with tempfile.TemporaryDirectory(prefix="nanofleet-spool-") as name:
        folder = Path(name)
        spool = spooled(folder, *[b"%02d" % number + payload for number, payload in enumerate(payloads)])
        for _ in range(min(done, len(payloads) - 1)):
            taken = first_of(spool)
            assert taken is not None
            spool.done(taken)
        first = min(done, len(payloads) - 1)
        spool.close()
        (path,) = files_of(folder)
        content = bytearray(path.read_bytes())
        content[int(place * len(content))] ^= flip
        path.write_bytes(content)

        numbers = [int(payload[:2]) for payload in drained(Spool(folder, WIDE))]
        assert numbers == sorted(set(numbers))
        # Damage in its state may bring one back that was done.
        assert len(set(numbers) ^ set(range(first, len(payloads)))) <= 1


class AnyLife(RuleBasedStateMachine):
    """A spool that is appended to, read, killed and out of room, in any order, against a list."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="nanofleet-spool-"))
        self.bounds = SpoolBounds(max_bytes=4000, max_age_s=3600.0)
        self.room: int | None = None
        self.number = 0
        # Appended and neither done nor shed, in order.
        self.waiting: list[bytes] = []
        self.spool = self.opened()

    def opened(self) -> Spool:
        return Spool(self.folder, self.bounds, write=self.write)

    def write(self, file: int, content: bytes) -> int:
        if self.room is None:
            return os.write(file, content)
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = os.write(file, content[: self.room])
        self.room -= written
        return written

    @rule(size=st.integers(0, 600))
    def append(self, size: int) -> None:
        payload = b"%06d" % self.number + MAGIC * (size // 4)
        self.number += 1
        before = self.spool.shed_spans
        try:
            self.spool.append(payload, spans=1, now_s=100.0)
        except OSError:
            assert self.room is not None
        else:
            self.waiting.append(payload)
        self.note_shed(self.spool.shed_spans - before)

    def note_shed(self, count: int) -> None:
        # What is out is shed no more.
        first = len(self.spool._out)
        del self.waiting[first : first + count]

    @rule(max_bytes=st.integers(0, 2000), sent=st.integers(0, 5))
    def take(self, max_bytes: int, sent: int) -> None:
        were_out = len(self.spool._out)
        taken = self.spool.take(100.0, max_bytes=max_bytes)
        assert [one.payload for one in taken] == self.waiting[: len(taken)]
        assert bool(taken) is bool(self.waiting)
        assert were_out or len(taken) <= 1 or sum(len(one.payload) for one in taken) <= max_bytes
        for one in taken[:sent]:
            self.spool.done(one)
            self.waiting.pop(0)

    def forget_what_lived_in_memory(self) -> None:
        """What was out when its segment was shed is nowhere else."""
        here = {segment.number for segment in self.spool._segments}
        del self.waiting[: sum(one.segment not in here for one in self.spool._out)]

    @rule()
    def die_and_come_back(self) -> None:
        self.forget_what_lived_in_memory()
        # As a kill leaves it: nothing is ended in order.
        for segment in self.spool._segments:
            segment.close()
        self.spool = self.opened()
        self.note_shed(self.spool.shed_spans)

    @rule()
    def end_and_come_back(self) -> None:
        self.forget_what_lived_in_memory()
        self.spool.close()
        self.spool = self.opened()

    @rule(room=st.integers(0, 400))
    def fill_the_disk(self, room: int) -> None:
        self.room = room

    @rule()
    def free_the_disk(self) -> None:
        self.room = None

    @invariant()
    def the_files_stay_within_the_bound(self) -> None:
        assert sum(path.stat().st_size for path in files_of(self.folder)) <= self.bounds.max_bytes

    @invariant()
    def it_says_how_much_waits(self) -> None:
        assert self.spool.waiting_bytes == sum(len(payload) for payload in self.waiting)

    def teardown(self) -> None:
        self.spool.close()
        shutil.rmtree(self.folder)


TestAnyLife = AnyLife.TestCase
TestAnyLife.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
