"""Fill and empty an outbox until somebody ends this process: `python -m tests.support.outbox_crashes FOLDER`.

Says on standard output, a line each and only once it is durable: `put N` and `sent N`. Names of rows are the numbers
that follow those found at start.
"""

import sys
from pathlib import Path

from edge_agent.outbox.ageing import this_boot
from edge_agent.outbox.rows import Kind, NewRow
from edge_agent.outbox.storage import Storage
from tests.support.clocks import HeldClock
from tests.support.outbox_values import LIMITS


def opened(folder: Path) -> Storage:
    storage = Storage(folder / "outbox.sqlite", LIMITS, clock=HeldClock(), boot=this_boot())
    storage.open()
    return storage


def names(storage: Storage) -> list[int]:
    return [int(row.dedupe_id) for row in storage.oldest(Kind.USAGE, limit=1000, max_bytes=1 << 30)]


def main(folder: Path, first: int) -> None:
    storage = opened(folder)
    number = first
    while True:
        batch = range(number, number + 3)
        storage.add([NewRow(Kind.USAGE, f"{each}", bytes(2000), storage.age.now_s(), 0) for each in batch])
        if (trouble := storage.figures().trouble) is not None:
            raise SystemExit(f"expected a sound disk, got {trouble.value}")
        number += 3
        say(f"put {number - 1}")
        if len(waiting := storage.oldest(Kind.USAGE, limit=1000, max_bytes=1 << 30)) > 30:
            storage.remove([row.number for row in waiting[:20]])
            say(f"sent {waiting[19].dedupe_id}")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
