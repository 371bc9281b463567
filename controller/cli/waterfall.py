"""One trace as a waterfall: a row per span, indented below its parent, its bar where its time was.

    tier    stage                12.4 ms in all      duration
    device  ask digits-nano      ████████████████████ 12.4 ms
    edge     process digits-nano  ▐█████████████████  11.0 ms
    edge      compute              ▐▎                0.310 ms
    edge      offload               ▐██████████████▎  10.2 ms

Clocks of different machines differ, so a child may seem to start before its parent; bars show what the spans say.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from controller.api import operator_views as views
from controller.cli.screen import milliseconds_text, peer_text

# Service name → tier and colour; a service that is not ours keeps its name.
_TIERS = {
    "nanofleet-device": ("device", "magenta"),
    "nanofleet-agent": ("edge", "green"),
    "nanofleet-controller": ("gateway", "blue"),
    "nanofleet-heavy": ("heavy", "yellow"),
}
_OTHER_COLOUR = "cyan"
_ERROR_COLOUR = "red"
# Deeper than any request of ours; a peer's trace may be deeper, and its rows must keep room for their bars.
_MAX_INDENT = 8
# The facts that explain where a request went, in the order in which they are told.
_FACTS = {
    "nanofleet.route.reason": "reason",
    "nanofleet.confidence": "confidence",
    "nanofleet.escalated": "escalated",
    "nanofleet.variant": "variant",
    "error.type": "error",
}


@dataclass(frozen=True, slots=True)
class Row:
    span: views.SpanView
    depth: int


def rows_of(spans: Sequence[views.SpanView]) -> list[Row]:
    """Return the spans depth first, siblings by start; a span whose parent is not here is a root."""
    known = {span.span_id for span in spans}
    children: dict[str | None, list[views.SpanView]] = {}
    for span in sorted(spans, key=lambda span: (span.start_us, -span.duration_us)):
        parent = span.parent_span_id if span.parent_span_id in known and span.parent_span_id != span.span_id else None
        children.setdefault(parent, []).append(span)
    rows = list(_below(None, children, depth=0))
    # Spans that are each other's ancestors hang below no root; a peer's mistake must not hide them.
    shown = {row.span.span_id for row in rows}
    return rows + [Row(span, 0) for span in spans if span.span_id not in shown]


def _below(parent: str | None, children: dict[str | None, list[views.SpanView]], *, depth: int) -> Iterator[Row]:
    # A stack instead of recursion: the depth is a peer's choice.
    waiting = [Row(span, depth) for span in reversed(children.get(parent, []))]
    while waiting:
        row = waiting.pop()
        yield row
        waiting += [Row(span, row.depth + 1) for span in reversed(children.get(row.span.span_id, []))]


def draw(trace: views.TraceView) -> RenderableType:
    start_us = min(span.start_us for span in trace.spans)
    total_us = max(1, max(span.start_us + span.duration_us for span in trace.spans) - start_us)
    table = Table(box=None, expand=True, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("tier", no_wrap=True)
    table.add_column("stage", no_wrap=True, overflow="ellipsis", ratio=2)
    table.add_column(f"{milliseconds_text(total_us)} in all", ratio=3, min_width=8, no_wrap=True)
    table.add_column("duration", justify="right", no_wrap=True)
    for row in rows_of(trace.spans):
        span, (tier, colour) = row.span, _tier(row.span)
        begin_us = span.start_us - start_us
        table.add_row(
            peer_text(tier, style=colour),
            peer_text(" " * min(row.depth, _MAX_INDENT) + span.name, style=_ERROR_COLOUR if span.is_error else ""),
            _bar(begin_us, begin_us + span.duration_us, total_us, colour=_ERROR_COLOUR if span.is_error else colour),
            Text(milliseconds_text(span.duration_us), style=_ERROR_COLOUR if span.is_error else ""),
        )
    return Group(Text(f"trace {trace.trace_id}", style="bold"), table, *_facts(trace.spans))


def tier_text(service: str) -> Text:
    tier, colour = _TIERS.get(service, (service, _OTHER_COLOUR))
    return peer_text(tier, style=colour)


def _tier(span: views.SpanView) -> tuple[str, str]:
    return _TIERS.get(span.service, (span.service, _OTHER_COLOUR))


def _bar(begin_us: int, end_us: int, total_us: int, *, colour: str) -> Bar:
    # At least a sliver: a stage of microseconds inside one of seconds is still there.
    return Bar(total_us, begin_us, max(end_us, begin_us + total_us // 200 + 1), color=colour)


def _facts(spans: Sequence[views.SpanView]) -> Iterator[Text]:
    """Yield one line per tier on what was decided there."""
    told: dict[str, dict[str, object]] = {}
    for span in spans:
        tier, _ = _tier(span)
        for key, word in _FACTS.items():
            if key in span.attributes:
                told.setdefault(tier, {}).setdefault(word, span.attributes[key])
    for tier, facts in told.items():
        words = ", ".join(f"{word} {_short(facts[word])}" for word in _FACTS.values() if word in facts)
        yield peer_text(f"{tier}: {words}", style="dim")


def _short(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
