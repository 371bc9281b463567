"""The queue in memory, for as long as the disk takes nothing: the same as `database`, small, and gone with the process.

Its numbers begin beyond those of any database, so that a row is found again wherever it is.
"""

from itertools import count

from edge_agent.outbox.rows import Kind, NewRow, Row, Tally

FIRST_NUMBER = 1 << 62


class Ring:
    def __init__(self) -> None:
        self._numbers = count(FIRST_NUMBER)
        # In the order of their numbers.
        self._rows: dict[Kind, dict[int, NewRow]] = {kind: {} for kind in Kind}
        self._of: dict[tuple[Kind, str], int] = {}
        self._bytes: dict[Kind, int] = dict.fromkeys(Kind, 0)

    def add(self, rows: list[NewRow]) -> None:
        for row in rows:
            before = self._of.get((row.kind, row.dedupe_id))
            if before is not None:
                self._drop(row.kind, before)
            number = next(self._numbers)
            self._rows[row.kind][number] = row
            self._of[row.kind, row.dedupe_id] = number
            self._bytes[row.kind] += row.size_bytes

    def oldest(self, kind: Kind, *, limit: int, max_bytes: int) -> list[Row]:
        found: list[Row] = []
        size_bytes = 0
        for number, row in self._rows[kind].items():
            size_bytes += row.size_bytes
            if len(found) >= limit or (found and size_bytes > max_bytes):
                break
            found.append(Row(number, kind, row.dedupe_id, row.body, row.born_s, row.at_us))
        return found

    def remove(self, numbers: list[int]) -> None:
        for number in numbers:
            for kind in Kind:
                if number in self._rows[kind]:
                    self._drop(kind, number)

    def taken(self) -> list[NewRow]:
        """Empty the ring and return what was in it, in order."""
        rows = sorted((number, row) for kind in Kind for number, row in self._rows[kind].items())
        for number, row in rows:
            self._drop(row.kind, number)
        return [row for _, row in rows]

    def tally(self, kind: Kind) -> Tally:
        rows = self._rows[kind]
        oldest_s = next(iter(rows.values())).born_s if rows else None
        return Tally(len(rows), self._bytes[kind], oldest_s)

    def shed_oldest(self, kind: Kind, rows: int) -> None:
        for number in list(self._rows[kind])[:rows]:
            self._drop(kind, number)

    def shed_bytes(self, kind: Kind, size_bytes: int) -> int:
        shed = 0
        for number, row in list(self._rows[kind].items()):
            if size_bytes <= 0:
                break
            size_bytes -= row.size_bytes
            self._drop(kind, number)
            shed += 1
        return shed

    def shed_older(self, kind: Kind, born_before_s: float) -> int:
        old = [number for number, row in self._rows[kind].items() if row.born_s < born_before_s]
        for number in old:
            self._drop(kind, number)
        return len(old)

    def _drop(self, kind: Kind, number: int) -> None:
        row = self._rows[kind].pop(number)
        self._bytes[kind] -= row.size_bytes
        if self._of.get((kind, row.dedupe_id)) == number:
            del self._of[kind, row.dedupe_id]
