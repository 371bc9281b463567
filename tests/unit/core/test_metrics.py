"""Counters, histograms and gauges, and how Prometheus reads them: by the parsers of its own client library."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.exposition import OPEN_METRICS, TEXT, exposed, prefers_open_metrics, written
from core.metrics import OTHER, Exemplar, Registry
from core.process_metrics import register_process
from tests.support.exposed import families, text_families

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PROMETHEUS_ACCEPT = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)


def text(registry: Registry) -> str:
    return written(registry.families(), is_open_metrics=False).decode()


def open_metrics(registry: Registry) -> str:
    return written(registry.families(), is_open_metrics=True).decode()


def number_of(body: str, name: str, **labels: str) -> float:
    found = [
        sample.value
        for family in families(body)
        for sample in family.samples
        if sample.name == name and sample.labels == labels
    ]
    assert len(found) == 1, (name, labels, body)
    return float(found[0])


def test_a_counter_counts_by_its_labels() -> None:
    registry = Registry()
    asked = registry.counter("asked", "Asked.", ("model",))
    asked.of("digits").inc()
    asked.of("digits").inc(2)
    asked.of("faces").inc()

    assert number_of(open_metrics(registry), "asked_total", model="digits") == 3
    assert number_of(open_metrics(registry), "asked_total", model="faces") == 1


def test_a_value_on_the_bound_of_a_bucket_is_in_it() -> None:
    registry = Registry()
    took = registry.histogram("took_seconds", "Took.", bounds=(0.1, 1.0)).of()
    for value in (0.05, 0.1, 0.5, 1.0, 7.0):
        took.observe(value)

    body = open_metrics(registry)
    assert [number_of(body, "took_seconds_bucket", le=le) for le in ("0.1", "1.0", "+Inf")] == [2, 4, 5]
    assert number_of(body, "took_seconds_count") == 5
    assert number_of(body, "took_seconds_sum") == pytest.approx(8.65)


def test_an_exemplar_stands_at_the_bucket_of_its_value() -> None:
    registry = Registry()
    took = registry.histogram("took_seconds", "Took.", bounds=(0.1, 1.0)).of()
    took.observe(0.5)
    took.remember(Exemplar(TRACE_ID, 0.5, 1_800_000_000.25))

    (family,) = families(open_metrics(registry))
    exemplars = {sample.labels["le"]: sample.exemplar for sample in family.samples if "le" in sample.labels}
    assert exemplars["0.1"] is None
    assert exemplars["1.0"] is not None
    assert (exemplars["1.0"].labels, exemplars["1.0"].value) == ({"trace_id": TRACE_ID}, 0.5)
    assert float(exemplars["1.0"].timestamp or 0) == 1_800_000_000.25


def test_the_text_format_has_no_exemplars_and_no_end() -> None:
    registry = Registry()
    took = registry.histogram("took_seconds", "Took.", bounds=(0.1,)).of()
    took.observe(0.5)
    took.remember(Exemplar(TRACE_ID, 0.5, 1.0))

    assert TRACE_ID not in text(registry)
    assert "EOF" not in text(registry)
    assert text(registry).startswith("# HELP took_seconds Took.\n# TYPE took_seconds histogram\n")


def test_a_counter_is_called_by_its_sample_in_the_text_format() -> None:
    registry = Registry()
    registry.counter("asked", "Asked.").of().inc()

    assert text(registry) == "# HELP asked_total Asked.\n# TYPE asked_total counter\nasked_total 1\n"


def test_gauges_are_read_when_somebody_asks() -> None:
    registry = Registry()
    depths = {"digits": 1.0}
    registry.gauge("depth", "Depth.", ("model",), lambda: [((name,), depth) for name, depth in depths.items()])
    depths["digits"] = 4.5

    assert number_of(open_metrics(registry), "depth", model="digits") == 4.5


def test_a_family_without_samples_is_left_out() -> None:
    registry = Registry()
    registry.counter("asked", "Asked.", ("model",))

    assert text(registry) == ""


def test_beyond_its_bound_a_family_counts_what_is_new_as_other() -> None:
    registry = Registry(max_children=2)
    asked = registry.counter("asked", "Asked.", ("model", "tier"))
    for model in ("a", "b", "c", "d"):
        asked.of(model, "edge").inc()

    assert number_of(open_metrics(registry), "asked_total", model=OTHER, tier=OTHER) == 2
    assert asked.of("c", "edge") is asked.of("d", "edge")


@pytest.mark.parametrize("name", ["Asked", "asked.total", "1asked", ""])
def test_a_name_that_prometheus_would_not_take_is_a_defect(name: str) -> None:
    with pytest.raises(ValueError, match="expected lower-case words"):
        Registry().counter(name, "Asked.")


def test_two_families_of_one_name_are_a_defect() -> None:
    registry = Registry()
    registry.counter("asked", "Asked.")
    with pytest.raises(ValueError, match="registered twice"):
        registry.gauge("asked", "Asked.", (), list)


def test_too_few_values_for_the_labels_are_a_defect() -> None:
    with pytest.raises(ValueError, match="expected"):
        Registry().counter("asked", "Asked.", ("model",)).of()


# Line ends other than \n are left as they are by the formats, and split lines in the parsers of the library.
anything = st.text(st.characters(blacklist_categories=["Cs", "Cc", "Zl", "Zp"], whitelist_characters="\n"), max_size=40)


@given(value=anything, help_=anything, number=st.floats(allow_nan=False))
def test_whatever_stands_in_a_label_comes_back(value: str, help_: str, number: float) -> None:
    registry = Registry()
    registry.gauge("depth", help_, ("model",), lambda: [((value,), number)])

    for family in (*families(open_metrics(registry)), *text_families(text(registry))):
        assert [(sample.labels, sample.value) for sample in family.samples] == [({"model": value}, number)]


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (PROMETHEUS_ACCEPT, True),
        ("application/openmetrics-text; version=1.0.0", True),
        ("text/plain;version=0.0.4;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5", False),
        ("text/plain", False),
        ("*/*", False),
        ("", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=much", False),
        (";;,,;q=,=", False),
        ("application/openmetrics-text," * 1000, True),
    ],
)
def test_the_format_is_the_one_that_is_preferred(accept: str, expected: bool) -> None:
    assert prefers_open_metrics(accept) is expected


async def test_what_cannot_be_read_at_once_is_fresh_before_it_is_written() -> None:
    registry = Registry()
    known = [0.0]

    async def look() -> None:
        known[0] = 7.0

    registry.before_scrape(look)
    registry.gauge("depth", "Depth.", (), lambda: [((), known[0])])

    body, content_type = await exposed(registry, accept="")
    assert (body, content_type) == (b"# HELP depth Depth.\n# TYPE depth gauge\ndepth 7\n", TEXT)
    assert (await exposed(registry, accept=PROMETHEUS_ACCEPT)).content_type == OPEN_METRICS


def test_the_process_shows_what_the_system_says_of_it() -> None:
    registry = Registry()
    register_process(registry, version="1.2.3")

    body = open_metrics(registry)
    assert number_of(body, "nanofleet_build", version="1.2.3") == 1
    assert number_of(body, "process_resident_memory_bytes") > 1 << 20
    assert number_of(body, "process_cpu_seconds_total") > 0
    assert 0 < number_of(body, "process_open_fds") < number_of(body, "process_max_fds")
    assert number_of(body, "process_start_time_seconds") > 1_500_000_000
