"""The dashboards that we ship are sound documents whose parts fit together; `test_prometheus` asks their queries."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

GRAFANA = Path(__file__).parents[3] / "deploy" / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
WIDTH = 24


def panels_of(dashboard: Path) -> list[dict[str, Any]]:
    return list(json.loads(dashboard.read_text())["panels"])


def provisioned() -> dict[str, str]:
    """Return the type of each data source by its uid."""
    content = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "nanofleet.yml").read_text())
    return {source["uid"]: source["type"] for source in content["datasources"]}


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return (
        one["x"] < other["x"] + other["w"]
        and other["x"] < one["x"] + one["w"]
        and one["y"] < other["y"] + other["h"]
        and other["y"] < one["y"] + one["h"]
    )


def test_there_are_dashboards_under_names_of_their_own() -> None:
    assert len({json.loads(dashboard.read_text())["uid"] for dashboard in DASHBOARDS}) == len(DASHBOARDS) >= 3


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_have_a_place_and_a_number_of_their_own(dashboard: Path) -> None:
    panels = panels_of(dashboard)
    places = [panel["gridPos"] for panel in panels]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= WIDTH for place in places)
    assert not [pair for pair in combinations(places, 2) if overlap(*pair)]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_says_what_it_shows(dashboard: Path) -> None:
    silent = [panel["title"] for panel in panels_of(dashboard) if panel["type"] != "row" and not panel["description"]]
    assert silent == []


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_data_source_is_provisioned(dashboard: Path) -> None:
    named = [
        each["datasource"]
        for panel in panels_of(dashboard)
        for each in (panel, *panel.get("targets", ()))
        if "datasource" in each
    ]
    assert named
    assert {source["uid"]: source["type"] for source in named}.items() <= provisioned().items()


def test_exemplars_lead_to_a_data_source_of_traces() -> None:
    content = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "nanofleet.yml").read_text())
    destinations = [
        destination
        for source in content["datasources"]
        for destination in source.get("jsonData", {}).get("exemplarTraceIdDestinations", ())
    ]
    assert [each["name"] for each in destinations] == ["trace_id"]
    assert provisioned()[destinations[0]["datasourceUid"]] == "tempo"
