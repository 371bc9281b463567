"""What an exposition says, by the parsers of Prometheus' own client library."""

from collections.abc import Mapping, Sequence

from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

Series = tuple[str, frozenset[tuple[str, str]]]


def families(exposition: str) -> Sequence[Metric]:
    """Return the families of an OpenMetrics exposition."""
    return list(parse_open_metrics(exposition))  # type: ignore[no-untyped-call]  # the library leaves it unannotated


def text_families(exposition: str) -> Sequence[Metric]:
    """Return the families of an exposition in the text format."""
    return list(parse_text(exposition))


def numbers(exposition: bytes) -> Mapping[Series, float]:
    """Return every sample of an OpenMetrics exposition by its name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): float(sample.value)
        for family in families(exposition.decode())
        for sample in family.samples
    }
