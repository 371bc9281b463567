"""One trace as rows of a waterfall: a span each, below its parent, and the ways between machines as rows of their own.

    device   ask digits-nano          ████████████████████ 12.4 ms
    mqtt       to the agent           ▐
    edge       process digits-nano     ▐█████████████████  11.0 ms
    edge         offload                 ▐██████████████▎  10.2 ms
    network        to the gateway        ▐
    gateway        infer digits-large     ▐█████████
    mqtt       back to the device                       ▐

A way is the time between a span and its parent in another process, by the clocks of both machines: where these differ
by more than the way took, the row is left out rather than drawn backwards.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from controller.traces.model import SpanRecord
from controller.traces.stages import TierName, tier_of

# Deeper than any request of ours; a peer's trace may be deeper, and its rows must keep room for their bars.
MAX_DEPTH = 8
# Chosen: more rows than anybody reads, and a page of some hundred kilobytes.
MAX_ROWS = 500
# A bar is never thinner than this share of the whole, so that a stage of microseconds is still there.
_MIN_WIDTH = 0.4


@dataclass(frozen=True, slots=True)
class Row:
    """`left` and `width` are percent of the whole trace; a way has no span."""

    tier: str
    name: str
    depth: int
    left: float
    width: float
    start_us: int
    duration_us: int
    span: SpanRecord | None = None

    @property
    def is_error(self) -> bool:
        return self.span is not None and self.span.is_error


@dataclass(frozen=True, slots=True)
class Waterfall:
    rows: tuple[Row, ...]
    start_us: int
    duration_us: int
    span_count: int
    is_cut: bool
    # Time inside each tier that none of its children spent, in the order of STAGES' tiers; ways under "network".
    own_us: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class _Node:
    span: SpanRecord
    depth: int


def tiers_of(services: Iterable[str]) -> list[str]:
    """Return the tiers of services along the way of a request, those that are not ours last and by their own name."""
    found = {tier_of(service) or service for service in services}
    return [tier for tier in TierName if tier in found] + sorted(found - set(TierName))


def waterfall_of(spans: Sequence[SpanRecord]) -> Waterfall:
    """Return the rows of a trace that has at least one span, depth first, siblings by start."""
    start_us = min(span.start_us for span in spans)
    total_us = max(1, max(span.start_us + span.duration_us for span in spans) - start_us)
    by_id = {span.span_id: span for span in spans}
    rows = list(_rows(_nodes(spans, by_id), by_id))
    placed = [_placed(row, start_us, total_us) for row in rows[:MAX_ROWS]]
    return Waterfall(tuple(placed), start_us, total_us, len(spans), len(rows) > MAX_ROWS, _own_time(spans, by_id))


def _rows(nodes: Sequence[_Node], by_id: dict[str, SpanRecord]) -> Iterator[Row]:
    """Yield the row of every span, the way there before it and the way back after all that is below it."""
    backs: list[tuple[int, Row]] = []
    for node in nodes:
        while backs and backs[-1][0] >= node.depth:
            yield backs.pop()[1]
        parent = by_id.get(node.span.parent_span_id or "")
        way, back = (None, None) if parent is None else _ways(parent, node)
        if way is not None:
            yield way
        yield _row(node)
        if back is not None:
            backs.append((node.depth, back))
    yield from (row for _, row in reversed(backs))


def _nodes(spans: Sequence[SpanRecord], by_id: dict[str, SpanRecord]) -> list[_Node]:
    children: dict[str | None, list[SpanRecord]] = {}
    for span in sorted(spans, key=lambda span: (span.start_us, -span.duration_us)):
        parent = span.parent_span_id if span.parent_span_id in by_id and span.parent_span_id != span.span_id else None
        children.setdefault(parent, []).append(span)
    nodes = list(_below(None, children))
    # Spans that are each other's ancestors hang below no root; a peer's mistake must not hide them.
    shown = {node.span.span_id for node in nodes}
    return nodes + [_Node(span, 0) for span in spans if span.span_id not in shown]


def _below(parent: str | None, children: dict[str | None, list[SpanRecord]]) -> Iterator[_Node]:
    # A stack instead of recursion: the depth is a peer's choice.
    waiting = [_Node(span, 0) for span in reversed(children.get(parent, []))]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [_Node(span, node.depth + 1) for span in reversed(children.get(node.span.span_id, []))]


def _row(node: _Node) -> Row:
    span = node.span
    return Row(
        tier_of(span.service) or span.service, span.name, min(node.depth, MAX_DEPTH), 0, 0, span.start_us,
        span.duration_us, span,
    )  # fmt: skip


def _ways(parent: SpanRecord, node: _Node) -> tuple[Row | None, Row | None]:
    """Return the way to a span in another process and the way back, where the two clocks allow to say."""
    span = node.span
    if parent.service == span.service and parent.instance == span.instance:
        return None, None
    there_us = span.start_us - parent.start_us
    back_us = (parent.start_us + parent.duration_us) - (span.start_us + span.duration_us)
    if there_us < 0 or back_us < 0:
        return None, None
    of_device = tier_of(parent.service) is TierName.DEVICE
    kind = "mqtt" if of_device else "network"
    ends = (tier_of(span.service) or span.service, tier_of(parent.service) or parent.service)
    depth = min(node.depth, MAX_DEPTH)
    end_us = span.start_us + span.duration_us
    return (
        Row(kind, f"to the {_place(ends[0])}", depth, 0, 0, parent.start_us, there_us),
        Row(kind, f"back to the {_place(ends[1])}", depth, 0, 0, end_us, back_us),
    )


def _place(tier: str) -> str:
    return {"edge": "agent", "heavy": "Ray replica"}.get(tier, tier)


def _placed(row: Row, start_us: int, total_us: int) -> Row:
    left = 100 * (row.start_us - start_us) / total_us
    width = max(_MIN_WIDTH, 100 * row.duration_us / total_us)
    left = min(left, 100 - _MIN_WIDTH)
    return Row(
        row.tier, row.name, row.depth, round(left, 3), round(min(width, 100 - left), 3), row.start_us,
        row.duration_us, row.span,
    )  # fmt: skip


def _own_time(spans: Sequence[SpanRecord], by_id: dict[str, SpanRecord]) -> tuple[tuple[str, int], ...]:
    """Return how the time of the trace divides among the tiers: each span's, less that of its children."""
    inside: dict[str, int] = {}
    for span in spans:
        if span.parent_span_id in by_id and span.parent_span_id is not None:
            inside[span.parent_span_id] = inside.get(span.parent_span_id, 0) + span.duration_us
    own: dict[str, int] = {}
    for span in spans:
        tier = tier_of(span.service) or span.service
        if tier == TierName.DEVICE:
            # What a device does not spend in the agent it waits for messages.
            tier = "mqtt"
        own[tier] = own.get(tier, 0) + max(0, span.duration_us - inside.get(span.span_id, 0))
    return tuple(own.items())
