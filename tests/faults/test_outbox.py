"""Ends of an agent at any instant: what the outbox took is there afterwards, in order; what left does not return."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

from edge_agent.outbox.rows import Kind, NewRow
from tests.support.outbox_crashes import names, opened

KILLS = 20
CUTS = 60


def killed_after(folder: Path, lines: int, *, first: int) -> tuple[int, int]:
    """Run a process on `folder` and kill it after so many words; return the last numbers it put and sent for sure."""
    command = [sys.executable, "-m", "tests.support.outbox_crashes", str(folder), str(first)]
    put, sent = first - 1, -1
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(lines):
            word, _, number = process.stdout.readline().partition(" ")
            put, sent = (int(number), sent) if word == "put" else (put, int(number))
        process.kill()
        # What it said between the last line and its end.
        for line in process.stdout:
            word, _, number = line.strip().partition(" ")
            if number:
                put, sent = (int(number), sent) if word == "put" else (put, int(number))
    assert process.returncode == -9
    return put, sent


def test_a_process_that_is_killed_at_any_instant_loses_no_row_that_it_took_and_repeats_none_that_left(
    tmp_path: Path,
) -> None:
    chance = random.Random(5)
    first, sent = 0, -1
    for _ in range(KILLS):
        put, newly_sent = killed_after(tmp_path, chance.randrange(1, 60), first=first)
        sent = max(sent, newly_sent)
        storage = opened(tmp_path)
        found = names(storage)
        assert storage.figures().trouble is None
        assert storage.taken_incidents() == []
        storage.close()
        # In order and without a gap, from the first that is not known to have left.
        assert found == list(range(found[0], found[-1] + 1)) if found else True
        assert not found or found[0] <= sent + 21
        assert found[-1] >= put if found else put <= sent
        assert not any(number <= sent for number in found)
        first = (found[-1] if found else put) + 1


def test_a_power_cut_that_tears_the_log_at_any_byte_leaves_a_beginning_of_what_was_put(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    storage = opened(whole)
    for number in range(12):
        storage.add([NewRow(Kind.USAGE, f"{number}", bytes(700), 0.0, 0)])
    log = (whole / "outbox.sqlite-wal").read_bytes()
    chance = random.Random(5)
    counts = set()
    for _ in range(CUTS):
        torn = tmp_path / "torn"
        shutil.copytree(whole, torn)
        at = chance.randrange(len(log))
        # Beyond the cut stands what the blocks held before, or nothing.
        rest = chance.randbytes(min(4096, len(log) - at)) if chance.random() < 0.5 else b""
        (torn / "outbox.sqlite-wal").write_bytes(log[:at] + rest)
        after = opened(torn)
        found = names(after)
        assert after.taken_incidents() == []
        after.close()
        assert found == list(range(len(found)))
        counts.add(len(found))
        shutil.rmtree(torn)
    storage.close()
    assert len(counts) > 3
