"""A registry as Prometheus reads it: the text format 0.0.4 and OpenMetrics 1.0.0, which alone carries exemplars.

    body, content_type = await exposed(registry, accept=request.headers["accept"])

Source: prometheus.io, "Exposition formats"; OpenMetrics 1.0.0, "Text format". The two differ in where `_total` stands,
in units, exemplars and the last line.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from core.metrics import Described, Description, Kind, Registry, Sample

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
# Chosen: Prometheus sends some 200; what is longer is not read.
_MAX_ACCEPT_CHARS = 1024


class Exposition(NamedTuple):
    body: bytes
    content_type: str


async def exposed(registry: Registry, *, accept: str) -> Exposition:
    """Return what `registry` holds now, in the format that `accept` prefers."""
    families = await registry.scraped()
    is_open = prefers_open_metrics(accept)
    return Exposition(written(families, is_open_metrics=is_open), OPEN_METRICS if is_open else TEXT)


def prefers_open_metrics(accept: str) -> bool:
    """Say whether an Accept header (RFC 9110, section 12.5.1) names OpenMetrics, and nothing of plain text above it."""
    weights = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for part in accept[:_MAX_ACCEPT_CHARS].lower().split(","):
        kind, *parameters = (word.strip() for word in part.split(";"))
        if kind in weights:
            weights[kind] = max(weights[kind], _weight(parameters))
    return (
        weights["application/openmetrics-text"] > 0 and weights["application/openmetrics-text"] >= weights["text/plain"]
    )


def _weight(parameters: Sequence[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


def written(families: Iterable[Described], *, is_open_metrics: bool) -> bytes:
    lines: list[str] = []
    for family in families:
        samples = family.samples()
        if samples:
            lines += _head(family.description, is_open_metrics=is_open_metrics)
            lines += [_line(family.description, sample, is_open_metrics=is_open_metrics) for sample in samples]
    if is_open_metrics:
        lines.append("# EOF")
    return "".join(f"{line}\n" for line in lines).encode()


def _head(description: Description, *, is_open_metrics: bool) -> list[str]:
    # The text format knows a counter by the name of its sample.
    is_total = description.kind is Kind.COUNTER and not is_open_metrics
    name = f"{description.name}_total" if is_total else description.name
    head = [f"# HELP {name} {_escaped(description.help, quote=is_open_metrics)}"]
    head.append(f"# TYPE {name} {description.kind.value}")
    if is_open_metrics and description.unit:
        head.append(f"# UNIT {name} {description.unit}")
    return head


def _line(description: Description, sample: Sample, *, is_open_metrics: bool) -> str:
    pairs = [f'{label}="{_escaped(value)}"' for label, value in zip(description.labels, sample.values, strict=True)]
    if sample.le is not None:
        # Always with its point, so that a bucket has one name in both formats.
        pairs.append(f'le="{_number(sample.le) if math.isinf(sample.le) else repr(sample.le)}"')
    labels = f"{{{','.join(pairs)}}}" if pairs else ""
    line = f"{description.name}{sample.suffix}{labels} {_number(sample.number)}"
    if is_open_metrics and sample.exemplar is not None:
        trace_id, value, at_s = sample.exemplar
        line += f' # {{trace_id="{_escaped(trace_id)}"}} {_number(value)} {at_s:.3f}'
    return line


def _number(number: float) -> str:
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "+Inf" if number > 0 else "-Inf"
    return f"{number:.0f}" if float(number).is_integer() and abs(number) < 1 << 53 else repr(float(number))


def _escaped(text: str, *, quote: bool = True) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quote else text
