"""`deploy/otel/collector.yaml`: whole in itself, and fitting what the controller sends.

No package index has a collector to run it with; its keys were held against the schemas that the collector publishes.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from controller.api.collector_client import CollectorSettings
from core.addresses import is_loopback, parse_address
from core.grpc_transport import MAX_MESSAGE_BYTES

PATH = Path(__file__).parents[3] / "deploy" / "otel" / "collector.yaml"
# By kind: what a pipeline may name.
KINDS = ("receivers", "processors", "exporters")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return dict(yaml.safe_load(PATH.read_text()))


def test_every_part_is_used_and_every_part_that_is_used_is_there(config: dict[str, Any]) -> None:
    pipelines = config["service"]["pipelines"]
    assert set(pipelines) == {"traces"}
    for kind in KINDS:
        assert set(config[kind]) == {name for pipeline in pipelines.values() for name in pipeline[kind]}
    assert set(config["extensions"]) == set(config["service"]["extensions"])


def test_it_listens_in_the_clear_on_loopback_only_where_the_controller_will_speak_so(config: dict[str, Any]) -> None:
    protocols = config["receivers"]["otlp"]["protocols"]
    assert set(protocols) == {"grpc"}
    address = parse_address(protocols["grpc"]["endpoint"])
    assert is_loopback(address.host)
    assert not CollectorSettings(address).speaks_tls
    assert f'forward_to = "{address}"' in PATH.read_text()


def test_it_takes_the_largest_request_that_the_controller_passes_on(config: dict[str, Any]) -> None:
    grpc = config["receivers"]["otlp"]["protocols"]["grpc"]
    assert grpc["max_recv_msg_size_mib"] << 20 >= MAX_MESSAGE_BYTES


def test_what_it_sends_waits_on_disk_for_as_long_as_it_takes(config: dict[str, Any]) -> None:
    for exporter in config["exporters"].values():
        assert exporter["sending_queue"]["storage"] in config["extensions"]
        assert exporter["retry_on_failure"]["max_elapsed_time"] == "0s"
    # It would hold in memory what was acknowledged.
    assert "batch" not in config["processors"]


def test_it_speaks_tls_to_other_machines(config: dict[str, Any]) -> None:
    for exporter in config["exporters"].values():
        is_local = is_loopback(parse_address(exporter["endpoint"]).host)
        assert is_local or not exporter["tls"].get("insecure", False)
        assert "insecure_skip_verify" not in exporter["tls"]
