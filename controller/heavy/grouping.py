"""Which waiting requests share one run of the model. Pure: decides, runs nothing.

Requests may share a run when their inputs differ only in the first dimension; their rows are then stacked, run once
and taken apart again. A model whose manifest says `max_batch` 1 runs every request alone.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from core.errors import InternalError
from core.tensors import Array

Feed = Mapping[str, Array]


def rows_of(feed: Feed) -> int:
    """Return the size of the first dimension, or 0 when the inputs do not share one."""
    sizes = {array.shape[0] if array.ndim else 0 for array in feed.values()}
    return sizes.pop() if len(sizes) == 1 else 0


def plan_groups(feeds: Sequence[Feed], *, max_rows: int) -> list[list[int]]:
    """Return groups of indexes into `feeds`; each group is one run, and every index stands in exactly one.

    A group has at most `max_rows` rows, unless a single request brings more. Groups start in order of arrival.
    """
    groups: list[list[int]] = []
    open_groups: dict[object, tuple[list[int], int]] = {}
    for index, feed in enumerate(feeds):
        rows, key = rows_of(feed), _stacking_key(feed)
        members, held = open_groups.get(key, ([], max_rows))
        if rows == 0 or max_rows == 1:
            groups.append([index])
        elif held + rows <= max_rows:
            members.append(index)
            open_groups[key] = (members, held + rows)
        else:
            members = [index]
            groups.append(members)
            open_groups[key] = (members, rows)
    return groups


def _stacking_key(feed: Feed) -> object:
    return tuple(sorted((name, array.dtype.str, array.shape[1:]) for name, array in feed.items()))


def stack(feeds: Sequence[Feed]) -> Feed:
    if len(feeds) == 1:
        return feeds[0]
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


def take_apart(outputs: Feed, rows: Sequence[int]) -> list[Feed]:
    """Return one part of every output per request, `rows` being the rows that each request brought.

    Raises:
        InternalError: an output has not one entry per row, so the manifest's `max_batch` is wrong for this model.
    """
    if len(rows) == 1:
        return [outputs]
    total, starts = sum(rows), np.cumsum([0, *rows])
    for name, array in outputs.items():
        if array.ndim == 0 or array.shape[0] != total:
            raise InternalError(
                f"output {name!r}: expected {total} rows for a batch, got shape {list(array.shape)}; "
                "publish the model with max_batch 1"
            )
    return [
        {name: array[start : start + size] for name, array in outputs.items()}
        for start, size in zip(starts, rows, strict=False)
    ]
