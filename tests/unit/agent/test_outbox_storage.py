"""The outbox on its disk: order, bounds, and every way in which a disk fails."""

import errno
import shutil
import sqlite3
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.outbox import database
from edge_agent.outbox.ageing import MAX_OFF_S, Boot
from edge_agent.outbox.ring import Ring
from edge_agent.outbox.rows import Bounds, Kind, Loss, NewRow, keep_within
from edge_agent.outbox.storage import MEMORY_MAX_ROWS, RETRY_S, Storage, StorageLimits, Trouble, set_aside
from tests.support.clocks import HeldClock

DAY_S = 86_400.0
BOUNDS = dict.fromkeys(Kind, Bounds(max_rows=100, max_bytes=1 << 20, max_age_s=7 * DAY_S))
LIMITS = StorageLimits(BOUNDS, max_bytes=4 << 20, min_free_bytes=0)


class Machine:
    """A disk, a clock and a kernel; `storage` is the process on it."""

    def __init__(self, folder: Path, limits: StorageLimits = LIMITS) -> None:
        self.path = folder / "outbox.sqlite"
        self.limits = limits
        self.clock = HeldClock()
        self.boot_id = "first"
        self.free_bytes = 1 << 40
        self.connect = database.connect
        self.storage = self.started()

    def started(self) -> Storage:
        self.storage = Storage(
            self.path,
            self.limits,
            clock=self.clock,
            boot=Boot(self.boot_id, self.clock.monotonic_s),
            connect=self.connect,
            free_bytes=lambda _: self.free_bytes,
        )
        self.storage.open()
        return self.storage

    def put(self, *names: str, kind: Kind = Kind.AUDIT, body: bytes = b"body") -> None:
        born_s, at_us = self.storage.age.now_s(), 0
        self.storage.add([NewRow(kind, name, body, born_s, at_us) for name in names])

    def names(self, kind: Kind = Kind.AUDIT) -> list[str]:
        return [row.dedupe_id for row in self.storage.oldest(kind, limit=1000, max_bytes=1 << 30)]

    def send(self, count: int, kind: Kind = Kind.AUDIT) -> None:
        """Let the first rows leave."""
        self.storage.remove([row.number for row in self.storage.oldest(kind, limit=count, max_bytes=1 << 30)])

    @property
    def trouble(self) -> Trouble | None:
        return self.storage.figures().trouble

    def lost(self, why: Loss, kind: Kind = Kind.AUDIT) -> int:
        return self.storage.figures().losses.get((kind, why), 0)

    def incidents(self) -> list[str]:
        return [incident.action for incident in self.storage.taken_incidents()]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_rows_come_back_in_order_after_a_restart(machine: Machine) -> None:
    machine.put("a", "b")
    machine.put("c")
    machine.storage.close()

    machine.started()

    assert machine.names() == ["a", "b", "c"]
    assert machine.storage.figures().tallies[Kind.AUDIT].rows == 3


def test_a_row_with_a_known_dedupe_id_takes_the_place_of_the_older_at_the_end(machine: Machine) -> None:
    machine.put("a", "b")
    [sent, _] = machine.storage.oldest(Kind.AUDIT, limit=2, max_bytes=1 << 20)
    machine.put("a", body=b"newer")
    # The receiver of the older one answers only now.
    machine.storage.remove([sent.number])

    rows = machine.storage.oldest(Kind.AUDIT, limit=9, max_bytes=1 << 20)

    assert [(row.dedupe_id, row.body) for row in rows] == [("b", b"body"), ("a", b"newer")]


def test_a_batch_has_no_more_bytes_than_asked_for_and_one_row_at_least(machine: Machine) -> None:
    machine.put("a", "b", "c", body=bytes(1000))

    assert len(machine.storage.oldest(Kind.AUDIT, limit=9, max_bytes=2500)) == 2
    assert len(machine.storage.oldest(Kind.AUDIT, limit=9, max_bytes=1)) == 1


def test_what_is_too_many_too_large_or_too_old_is_shed_oldest_first_and_counted_by_reason(tmp_path: Path) -> None:
    bounds = {**BOUNDS, Kind.AUDIT: Bounds(3, 2_000, 60.0)}
    machine = Machine(tmp_path, StorageLimits(bounds, 4 << 20, 0))

    machine.put("a", "b", "c", "d")
    assert (machine.names(), machine.lost(Loss.ROWS)) == (["b", "c", "d"], 1)
    machine.put("large", body=bytes(1_700))
    assert (machine.names(), machine.lost(Loss.BYTES)) == (["d", "large"], 1)
    machine.clock.pass_s(61)
    machine.storage.look_after()
    assert (machine.names(), machine.lost(Loss.AGE)) == ([], 2)


def test_when_all_kinds_together_are_too_large_the_least_missed_goes_first(tmp_path: Path) -> None:
    machine = Machine(tmp_path, StorageLimits(BOUNDS, 10_000, 0))

    machine.put("u", kind=Kind.USAGE, body=bytes(4_000))
    machine.put("t", kind=Kind.TELEMETRY, body=bytes(4_000))
    machine.put("e", kind=Kind.ESCALATION, body=bytes(4_000))

    assert (machine.names(Kind.TELEMETRY), machine.lost(Loss.TOTAL, Kind.TELEMETRY)) == ([], 1)
    assert (machine.names(Kind.USAGE), machine.names(Kind.ESCALATION)) == (["u"], ["e"])


# ---- clocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("days", [365, -365])
def test_a_wall_clock_that_jumps_by_a_year_while_the_agent_runs_ages_nothing(machine: Machine, days: int) -> None:
    machine.put("a")

    machine.clock.set(machine.clock.now() + timedelta(days=days))
    machine.storage.look_after()

    assert machine.names() == ["a"]


@pytest.mark.parametrize("days", [365, -365])
def test_a_wall_clock_that_jumps_by_a_year_over_a_restart_of_the_process_ages_nothing(
    machine: Machine, days: int
) -> None:
    machine.put("a")
    machine.storage.close()
    machine.clock.set(machine.clock.now() + timedelta(days=days))
    machine.started().look_after()

    assert machine.names() == ["a"]


def test_a_wall_clock_that_is_a_year_ahead_after_a_power_cut_counts_a_day_at_most(machine: Machine) -> None:
    machine.put("a")
    before_s = machine.storage.age.now_s()

    machine.storage.close()
    machine.boot_id = "second"
    machine.clock.set(machine.clock.now() + timedelta(days=365))
    machine.started().look_after()

    assert machine.names() == ["a"]
    assert machine.storage.age.now_s() - before_s == MAX_OFF_S


def test_a_wall_clock_that_is_behind_after_a_power_cut_keeps_nothing_for_ever(machine: Machine) -> None:
    machine.put("a")
    machine.storage.close()
    machine.boot_id = "second"
    machine.clock.set(machine.clock.now() - timedelta(days=365))
    machine.started()
    machine.clock.pass_s(7 * DAY_S + 1)
    machine.storage.look_after()

    assert (machine.names(), machine.lost(Loss.AGE)) == ([], 1)


def test_time_without_a_process_counts_while_the_machine_stays_up(machine: Machine) -> None:
    machine.put("a")
    machine.storage.close()
    machine.clock.pass_s(8 * DAY_S)
    machine.started().look_after()

    assert (machine.names(), machine.lost(Loss.AGE)) == ([], 1)


# ---- a disk that takes nothing ---------------------------------------------------------------------------------------


def test_a_full_disk_keeps_rows_in_memory_until_there_is_room(machine: Machine) -> None:
    machine.put("a")
    machine.free_bytes = -1
    machine.put("b")
    assert (machine.names(), machine.trouble) == (["a"], Trouble.FULL)
    machine.put("c")

    machine.free_bytes = 1 << 40
    machine.clock.pass_s(RETRY_S)
    machine.put("d")

    assert (machine.names(), machine.trouble) == (["a", "b", "c", "d"], None)
    assert machine.incidents() == ["outbox.full", "outbox.recovered"]


def test_a_database_that_sqlite_cannot_grow_counts_as_a_full_disk(machine: Machine) -> None:
    class Bounded(sqlite3.Connection):
        def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
            return super().execute("PRAGMA max_page_count = 12" if "max_page_count" in sql else sql, parameters)

    machine.storage.close()
    machine.connect = lambda path: sqlite3.connect(path, isolation_level=None, factory=Bounded)
    machine.started()
    machine.put("large", body=bytes(100_000))

    assert machine.trouble is Trouble.FULL
    assert machine.names() == ["large"]


def test_what_waits_on_a_disk_that_is_full_at_the_start_can_be_sent(machine: Machine) -> None:
    class Full(sqlite3.Connection):
        def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
            if sql.startswith(("INSERT", "DELETE")):
                error = sqlite3.OperationalError("database or disk is full")
                error.sqlite_errorcode = sqlite3.SQLITE_FULL
                raise error
            return super().execute(sql, parameters)

    machine.put("a", "b")
    machine.storage.close()
    machine.connect = lambda path: sqlite3.connect(path, isolation_level=None, factory=Full)
    machine.started()
    assert (machine.names(), machine.trouble) == (["a", "b"], Trouble.FULL)
    machine.send(1)
    machine.put("c")

    assert machine.names() == ["b"]
    machine.send(1)
    assert machine.names() == ["c"]


def test_what_left_while_the_disk_was_full_is_not_sent_twice(machine: Machine) -> None:
    machine.put("a", "b")
    machine.free_bytes = -1
    machine.put("c")
    machine.send(1)
    assert machine.names() == ["b"]
    machine.send(1)
    assert machine.names() == ["c"]

    machine.free_bytes = 1 << 40
    machine.clock.pass_s(RETRY_S)
    machine.storage.look_after()

    assert machine.names() == ["c"]
    machine.storage.close()
    machine.started()
    assert machine.names() == ["c"]


def test_memory_holds_few_rows_and_counts_the_others(machine: Machine) -> None:
    machine.free_bytes = -1
    machine.put(*(f"row {number}" for number in range(MEMORY_MAX_ROWS + 20)))
    machine.limits = LIMITS

    figures = machine.storage.figures()

    assert figures.tallies[Kind.AUDIT].rows == min(MEMORY_MAX_ROWS, BOUNDS[Kind.AUDIT].max_rows)
    assert machine.lost(Loss.MEMORY) == MEMORY_MAX_ROWS + 20 - figures.tallies[Kind.AUDIT].rows


def test_a_disk_that_is_read_only_is_said_and_memory_takes_the_rows(machine: Machine) -> None:
    machine.storage.close()
    machine.connect = lambda path: sqlite3.connect(
        f"file:{path}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
    )
    machine.started()
    machine.put("a")

    assert (machine.names(), machine.trouble) == (["a"], Trouble.READ_ONLY)
    assert machine.incidents() == ["outbox.read_only"]


def test_a_folder_that_cannot_be_made_is_said_and_memory_takes_the_rows(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    machine = Machine(tmp_path / "file")
    machine.put("a")

    assert machine.names() == ["a"]
    assert machine.trouble is not None


def test_a_disk_with_errors_is_tried_again(machine: Machine) -> None:
    machine.storage.close()

    is_broken = True

    def broken(path: Path) -> sqlite3.Connection:
        if is_broken:
            raise OSError(errno.EIO, "input/output error")
        return database.connect(path)

    machine.connect = broken
    machine.started()
    machine.put("a")
    assert machine.trouble == Trouble.FAULTY
    is_broken = False
    machine.clock.pass_s(RETRY_S)
    machine.put("b")

    assert machine.names() == ["a", "b"]
    assert machine.incidents() == ["outbox.faulty", "outbox.recovered"]


# ---- damage ----------------------------------------------------------------------------------------------------------


def overwritten(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100:] = b"\xa5" * (len(content) - 100)
    path.write_bytes(bytes(content))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def replaced(path: Path) -> None:
    path.write_bytes(b"no database at all, " * 500)


def of_another_format(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


@pytest.mark.parametrize("damage", [overwritten, truncated, replaced, of_another_format])
def test_a_damaged_database_is_set_aside_at_start_and_begun_anew(
    machine: Machine, damage: Callable[[Path], None]
) -> None:
    machine.put(*"abcdefgh", body=bytes(3000))
    machine.storage.close()
    damage(machine.path)

    machine.started()
    machine.put("new")

    assert (machine.names(), machine.trouble) == (["new"], None)
    assert machine.incidents() == ["outbox.corrupt"]
    assert len(list(machine.path.parent.glob("outbox.corrupt-*"))) == 1


def test_damage_that_shows_while_it_runs_is_set_aside_and_what_was_known_is_counted(machine: Machine) -> None:
    machine.put(*(f"row {number}" for number in range(60)), body=bytes(3000))
    machine.storage.close()
    machine.started()
    # In place: the open file is the same one. Its first page stays, so that it looks like a database.
    with machine.path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (machine.path.stat().st_size - 4096))

    machine.names()
    machine.put("new")

    assert (machine.names(), machine.trouble) == (["new"], None)
    assert machine.lost(Loss.CORRUPT) == 60


def test_only_the_newest_damaged_database_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "outbox.sqlite"
    for at_s in (1, 2):
        path.write_bytes(b"damaged")
        path.with_name("outbox.sqlite-wal").write_bytes(b"its log")
        set_aside(path, at_s=at_s)

    assert sorted(each.name for each in tmp_path.iterdir()) == ["outbox.corrupt-2", "outbox.corrupt-2-wal"]


# ---- the same in memory ----------------------------------------------------------------------------------------------


# A disk that others use as well may take its time.
@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "send", "pass"]), st.sampled_from(list(Kind)), st.integers(0, 5)),
        max_size=40,
    )
)
def test_the_database_and_the_ring_do_the_same(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, Kind, int]]
) -> None:
    folder = tmp_path_factory.mktemp("outbox")
    disk, ring = database.Database(folder / "db", max_bytes=1 << 20), Ring()
    bounds = dict.fromkeys(Kind, Bounds(4, 600, 10.0))
    now_s = 0.0
    try:
        for act, kind, size in steps:
            if act == "add":
                rows = [NewRow(kind, f"{size}", bytes(40 * size), now_s, 0)]
                disk.add(rows)
                ring.add(rows)
            elif act == "send":
                for queue in (disk, ring):
                    queue.remove([row.number for row in queue.oldest(kind, limit=size, max_bytes=300)])
            else:
                now_s += 4.0
            lost = [keep_within(queue, bounds, max_bytes=1500, now_s=now_s) for queue in (disk, ring)]
            assert lost[0] == lost[1]
            assert [disk.tally(each) for each in Kind] == [ring.tally(each) for each in Kind]
            contents = [
                [row[2:] for each in Kind for row in queue.oldest(each, limit=99, max_bytes=1 << 20)]
                for queue in (disk, ring)
            ]
            assert contents[0] == contents[1]
    finally:
        disk.close()
        shutil.rmtree(folder)


def test_what_waits_is_its_owners_alone_to_read(machine: Machine) -> None:
    machine.put("a")
    machine.storage.close()
    machine.started()
    machine.put("b")

    # No index of the log beside them: it would need room on a full disk.
    modes = {path.name: path.stat().st_mode & 0o777 for path in machine.path.parent.glob("outbox.sqlite*")}
    assert modes == {"outbox.sqlite": 0o600, "outbox.sqlite-wal": 0o600}


def test_pages_that_the_queue_no_longer_needs_go_back_to_the_file_system(tmp_path: Path) -> None:
    machine = Machine(tmp_path, StorageLimits(dict.fromkeys(Kind, Bounds(5000, 32 << 20, DAY_S)), 64 << 20, 0))
    for start in range(0, 2000, 100):
        machine.put(*(f"{number}" for number in range(start, start + 100)), body=bytes(4000))
    while machine.names():
        machine.send(200)
    for _ in range(20):
        machine.storage.look_after()
    machine.storage.close()

    assert machine.path.stat().st_size < 2 << 20
