"""The recent spans as columns of numbers, for questions over all of them: percentiles, shares, heat maps.

The database is the truth; this is brought up to date from it, `TraceStore.lines_after` what is here already, and holds
as many of the newest rows as the store does. A question over 100,000 spans then takes milliseconds, not a scan.

A stage inside a request (`queue`, `compute`) names neither model nor site, and comes before the span that does. So both
are kept per trace, as the first span that knew said: a filter by model takes every stage of that model's requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from controller.traces.model import SpanLine
from controller.traces.stages import STAGES, WHOLE, Stage, TierName, model_of, stage_of

K = TypeVar("K")
Mask: TypeAlias = npt.NDArray[np.bool_]

_NONE = -1
_ESCALATED, _AT_EDGE = 1, 0
_CODES = {stage: code for code, stage in enumerate(STAGES)}
# Cut as often as so many rows have come beyond the bound, so that cutting costs little per row.
_SLACK_RATIO = 0.25
# Chosen: several times what an escalated request has.
_ROWS_PER_TRACE = 40


@dataclass(frozen=True, slots=True)
class Which:
    """Which spans: those that began in [from_us, until_us); None takes all."""

    from_us: int
    until_us: int
    model: str | None = None
    site: str | None = None
    tier: TierName | None = None
    stage: Stage | None = None


class _Names(Generic[K]):
    """A number for every name, in the order of coming."""

    def __init__(self) -> None:
        self._codes: dict[K, int] = {}
        self.names: list[K] = []

    def code(self, name: K) -> int:
        code = self._codes.get(name)
        if code is None:
            code = self._codes[name] = len(self.names)
            self.names.append(name)
        return code

    def find(self, name: K) -> int:
        """Return the number of a name; one that is nobody's for a name that never came."""
        return self._codes.get(name, len(self.names))


@dataclass(frozen=True, slots=True)
class Selected:
    """Spans that match a question, column by column; stages are numbers of STAGES."""

    start_us: npt.NDArray[np.int64]
    duration_us: npt.NDArray[np.int64]
    stage: npt.NDArray[np.int8]
    is_error: Mask
    # 1: the heavy tier answered the request of this trace, 0: the edge did, -1: not known.
    escalated: npt.NDArray[np.int8]

    def of(self, stage: Stage) -> "Selected":
        mask = self.stage == _CODES[stage]
        return Selected(
            self.start_us[mask], self.duration_us[mask], self.stage[mask], self.is_error[mask], self.escalated[mask]
        )


class SpanColumns:
    """One caller at a time; questions and `add` take milliseconds and belong on a thread."""

    def __init__(self, *, max_rows: int) -> None:
        self._max_rows = max_rows
        self.last_row = 0
        self._clear()

    def _clear(self) -> None:
        self._start_us = np.empty(0, np.int64)
        self._duration_us = np.empty(0, np.int64)
        self._stage = np.empty(0, np.int8)
        self._is_error = np.empty(0, np.bool_)
        self._trace = np.empty(0, np.int64)
        self._traces: _Names[str] = _Names()
        self._models: _Names[str] = _Names()
        self._sites: _Names[str] = _Names()
        self._trace_model = np.empty(0, np.int32)
        self._trace_site = np.empty(0, np.int32)
        self._trace_escalated = np.empty(0, np.int8)

    def __len__(self) -> int:
        return len(self._start_us)

    # ---- coming in -----------------------------------------------------------------------------------------------

    def add(self, lines: Sequence[SpanLine]) -> None:
        """Take lines in, in the order of their rows."""
        if not lines:
            return
        self.last_row = lines[-1].row
        traces = np.fromiter((self._traces.code(line.trace_id) for line in lines), np.int64, len(lines))
        self._grow_traces()
        for line, trace in zip(lines, traces, strict=True):
            self._learn(line, int(trace))
        self._start_us = _joined(self._start_us, [line.start_us for line in lines])
        self._duration_us = _joined(self._duration_us, [line.duration_us for line in lines])
        self._stage = _joined(self._stage, [_stage_code(line) for line in lines])
        self._is_error = _joined(self._is_error, [line.is_error for line in lines])
        self._trace = np.concatenate((self._trace, traces))
        if len(self) > self._max_rows * (1 + _SLACK_RATIO):
            self._cut()

    def _grow_traces(self) -> None:
        missing = len(self._traces.names) - len(self._trace_model)
        self._trace_model = np.append(self._trace_model, np.full(missing, _NONE, np.int32))
        self._trace_site = np.append(self._trace_site, np.full(missing, _NONE, np.int32))
        self._trace_escalated = np.append(self._trace_escalated, np.full(missing, _NONE, np.int8))

    def _learn(self, line: SpanLine, trace: int) -> None:
        model = model_of(line.name)
        # The edge names the model that the device asked for; behind it stands the one that it was handed on to.
        if model is not None and (self._trace_model[trace] == _NONE or _is_outermost(line)):
            self._trace_model[trace] = self._models.code(model)
        if line.site is not None:
            self._trace_site[trace] = self._sites.code(line.site)
        if line.is_escalated is not None:
            self._trace_escalated[trace] = _ESCALATED if line.is_escalated else _AT_EDGE

    def _cut(self) -> None:
        """Keep the newest rows, and of the traces those that still have one."""
        keep = slice(len(self) - self._max_rows, None)
        self._start_us, self._duration_us = self._start_us[keep], self._duration_us[keep]
        self._stage, self._is_error = self._stage[keep], self._is_error[keep]
        codes, self._trace = np.unique(self._trace[keep], return_inverse=True)
        names = self._traces.names
        self._traces = _Names()
        for code in codes:
            self._traces.code(names[code])
        self._trace_model, self._trace_site = self._trace_model[codes], self._trace_site[codes]
        self._trace_escalated = self._trace_escalated[codes]

    # ---- questions -----------------------------------------------------------------------------------------------

    @property
    def models(self) -> list[str]:
        """The models that were asked for, by name."""
        return sorted(self._models.names)

    @property
    def sites(self) -> list[str]:
        return sorted(self._sites.names)

    def select(self, which: Which) -> Selected:
        mask = self._mask(which)
        return Selected(
            self._start_us[mask],
            self._duration_us[mask],
            self._stage[mask],
            self._is_error[mask],
            self._trace_escalated[self._trace[mask]],
        )

    def trace_ids(self, which: Which, *, limit: int, at_least_us: int = 0, below_us: int | None = None) -> list[str]:
        """Return the traces with a span that matches and took [at_least_us, below_us), the last started first."""
        mask = self._mask(which) & (self._duration_us >= at_least_us)
        if below_us is not None:
            mask &= self._duration_us < below_us
        rows = np.flatnonzero(mask)
        # The latest rows nearly always hold enough traces; sorting all of them costs ten times as much.
        for sought in (limit * _ROWS_PER_TRACE, len(rows)):
            codes = self._latest_traces(rows, sought)
            if len(codes) >= limit or sought >= len(rows):
                break
        return [self._traces.names[code] for code in codes[:limit]]

    def _latest_traces(self, rows: npt.NDArray[np.intp], sought: int) -> list[int]:
        """Return the traces of the `sought` rows that started last, the last first."""
        if sought < len(rows):
            rows = rows[np.argpartition(self._start_us[rows], len(rows) - sought)[len(rows) - sought :]]
        by_start = rows[np.argsort(self._start_us[rows], kind="stable")[::-1]]
        return list(dict.fromkeys(self._trace[by_start].tolist()))

    def _mask(self, which: Which) -> Mask:
        mask = (self._start_us >= which.from_us) & (self._start_us < which.until_us)
        if which.model is not None:
            mask &= self._trace_model[self._trace] == self._models.find(which.model)
        if which.site is not None:
            mask &= self._trace_site[self._trace] == self._sites.find(which.site)
        if which.tier is not None:
            of_tier = [code for stage, code in _CODES.items() if stage.tier is which.tier]
            mask &= np.isin(self._stage, of_tier)
        if which.stage is not None:
            mask &= self._stage == _CODES[which.stage]
        return mask


def _is_outermost(line: SpanLine) -> bool:
    stage = stage_of(line.service, line.name)
    return stage is not None and stage.name == WHOLE and stage.tier in {TierName.DEVICE, TierName.EDGE}


def _stage_code(line: SpanLine) -> int:
    stage = stage_of(line.service, line.name)
    return _NONE if stage is None else _CODES[stage]


S = TypeVar("S", bound=np.generic)


def _joined(column: npt.NDArray[S], values: Sequence[object]) -> npt.NDArray[S]:
    return np.concatenate((column, np.array(values, column.dtype)))
