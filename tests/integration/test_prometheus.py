"""Debian's Prometheus on the configuration that we ship: it scrapes a real controller and a real agent, and every
metric that a rule or a dashboard names is really there.
"""

import asyncio
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.addresses import parse_address
from core.grpc_transport import open_channel
from core.spiffe import Role
from edge_agent.client.device import DeviceClient
from tests.support.controller_process import ControllerProcess
from tests.support.edge_models import INPUT, make_mlp
from tests.support.fake_agent import Dialler
from tests.support.fleet_values import CAM, made_hello
from tests.support.mosquitto import program_path, running_mosquitto
from tests.support.offline_agent import offline_agent
from tests.support.prometheus import CONFIGURATION, Prometheus, configured, running_prometheus

DEPLOY = CONFIGURATION.parent
INPUTS = 8
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACED = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}
TIMEOUT_S = 60.0
# What our metrics and those of the conventions begin with; recorded ones have a colon.
_METRIC = re.compile(r"\b(?:nanofleet[_:]|http_server_|rpc_server_|messaging_|process_)[a-z0-9_:]*\b(?!\s*=)")


@dataclass(frozen=True, slots=True)
class Scene:
    prometheus: Prometheus
    controller: str
    agent: str
    secret: str


def eventually(claim: Callable[[], bool], what: str) -> None:
    give_up_s = time.monotonic() + TIMEOUT_S
    while not claim():
        assert time.monotonic() < give_up_s, f"not within {TIMEOUT_S:g} s: {what}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A controller and an agent that was asked something, watched by Prometheus."""
    folder = tmp_path_factory.mktemp("prometheus")
    model = make_mlp(folder / "model", name="small", sizes=(INPUTS, 4))
    with (
        ControllerProcess(folder / "controller") as controller,
        running_mosquitto(folder) as broker,
        offline_agent(
            folder / "agent", models=[model], broker=broker, environment={"HTTP_BIND": "127.0.0.1:0"}
        ) as agent,
    ):
        url = controller.endpoints()["controller_http"]
        secret = viewer_secret(url, controller.bearer)
        face = json.loads((agent.state_dir / "endpoints.json").read_bytes())["http"]
        ask_what_nobody_has(url, secret)
        asyncio.run(check_health(controller))
        with (
            DeviceClient("camera", site=agent.site, broker=(broker.host, broker.port)) as device,
            running_prometheus(
                folder / "configuration", secret=secret, controller=url.removeprefix("http://"), agents=[face]
            ) as prometheus,
        ):
            tensor = {"name": INPUT, "shape": [1, INPUTS], "datatype": "FP32", "data": [0.5] * INPUTS}
            eventually(lambda: all(each["health"] == "up" for each in prometheus.targets()), "targets are up")
            asyncio.run(hold_session(controller, prometheus))
            # Between scrapes, so that there is a rate.
            for _ in range(3):
                reply = device.ask("small", {"inputs": [tensor]}, agent=agent.agent_id, properties=TRACED)
                assert reply.status == 200, reply
                time.sleep(1.5)
            yield Scene(prometheus, url, face, secret)


def viewer_secret(url: str, bearer: dict[str, str]) -> str:
    made = httpx.post(f"{url}/api/operators", headers=bearer, json={"name": "prometheus", "role": "viewer"})
    assert made.is_success, made.text
    return str(made.json()["secret"])


async def check_health(controller: ControllerProcess) -> None:
    address = parse_address(controller.endpoints()["controller_grpc"])
    async with open_channel(address, controller.tls(Role.APPLICATION, "line-7")) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)


async def hold_session(controller: ControllerProcess, prometheus: Prometheus) -> None:
    """Be a connected agent until Prometheus has seen it."""
    address = parse_address(controller.endpoints()["controller_grpc"])
    dialler = Dialler(address, controller.tls(Role.AGENT, CAM))
    async with dialler.dial() as agent:
        await agent.hello(made_hello())
        seen = partial(eventually, lambda: "nanofleet_sessions" in prometheus.names(), "the session was scraped")
        await asyncio.to_thread(seen)
        await agent.leave()
    await dialler.close()


def ask_what_nobody_has(url: str, secret: str) -> None:
    tensor = {"name": "x", "shape": [1], "datatype": "FP32", "data": [0.5]}
    answer = httpx.post(
        f"{url}/v2/models/nobodys/infer", headers={"authorization": f"Bearer {secret}"}, json={"inputs": [tensor]}
    )
    assert answer.status_code == 404


def test_the_shipped_configuration_and_rules_are_sound(tmp_path: Path) -> None:
    configuration = configured(tmp_path / "prometheus", secret="s", controller="127.0.0.1:1", agents=["127.0.0.1:2"])
    subprocess.run([program_path("promtool"), "check", "config", configuration], check=True)


def test_the_rules_say_what_they_should_of_made_up_series() -> None:
    tests = sorted((CONFIGURATION / "tests").glob("*.yml"))
    assert tests
    subprocess.run([program_path("promtool"), "test", "rules", *tests], check=True)


def test_both_are_scraped_with_what_they_have(scene: Scene) -> None:
    def up() -> dict[str, str]:
        return {each["metric"]["job"]: each["value"][1] for each in scene.prometheus.query("up")}

    eventually(lambda: up() == {"nanofleet-controller": "1", "nanofleet-agent": "1"}, "both are up")
    labels = 'outcome="answered", model="small", agent="gate-0", site="berlin"'
    eventually(lambda: bool(scene.prometheus.query(f"nanofleet_requests_total{{{labels}}} == 3")), "three answers")


def test_a_traced_request_leads_from_its_bucket_to_its_trace(scene: Scene) -> None:
    def traces() -> set[str]:
        found = scene.prometheus.exemplars('nanofleet_stage_duration_seconds_bucket{stage="total"}')
        return {exemplar["labels"]["trace_id"] for exemplar in found}

    eventually(lambda: TRACE_ID in traces(), "the exemplar is there")


def test_every_rule_can_be_computed_and_nothing_is_wrong_with_what_runs(scene: Scene) -> None:
    rules = scene.prometheus.rules()
    eventually(lambda: all(rule["health"] == "ok" for rule in scene.prometheus.rules()), "every rule was computed")
    assert len(rules) > 20
    firing = [rule["name"] for rule in scene.prometheus.rules() if rule.get("state") == "firing"]
    assert firing == []


@pytest.mark.parametrize("linter", ["controller", "agent"])
def test_promtool_finds_nothing_to_say_about_an_exposition(scene: Scene, linter: str) -> None:
    if linter == "controller":
        shown = httpx.get(f"{scene.controller}/metrics", headers={"authorization": f"Bearer {scene.secret}"})
    else:
        shown = httpx.get(f"http://{scene.agent}/metrics")
    assert shown.is_success
    subprocess.run([program_path("promtool"), "check", "metrics"], input=shown.content, check=True)


@pytest.mark.parametrize("shipped", sorted([*DEPLOY.glob("prometheus/rules/*.yml"), *DEPLOY.glob("grafana/**/*.json")]))
def test_every_metric_that_is_named_in_what_we_ship_is_really_there(scene: Scene, shipped: Path) -> None:
    named = set(_METRIC.findall(shipped.read_text()))
    recorded = {name for name in named if ":" in name}
    assert named
    assert recorded <= {rule["name"] for rule in scene.prometheus.rules()}
    scraped = named - recorded
    eventually(lambda: scraped <= scene.prometheus.names(), f"{scraped - scene.prometheus.names()}")


def expressions(dashboard: Path) -> list[str]:
    """Return the queries of a dashboard, with what Grafana would put in the place of its variables."""
    panels = json.loads(dashboard.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", ()) if "expr" in target]
    return [re.sub(r"\$(?:site|model|stage|tier)\b", ".*", each.replace("$__rate_interval", "1m")) for each in found]


@pytest.mark.parametrize("dashboard", sorted(DEPLOY.glob("grafana/dashboards/*.json")), ids=lambda path: path.stem)
def test_every_query_of_a_dashboard_can_be_answered(scene: Scene, dashboard: Path) -> None:
    asked = expressions(dashboard)
    assert len(asked) > 5
    for expression in asked:
        assert "$" not in expression
        scene.prometheus.query(expression)
