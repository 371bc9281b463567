"""`nanofleet demo` as a newcomer runs it: it keeps its promises and leaves nothing behind."""

import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from core.clock import SystemClock
from edge_agent.activation.journal import Journal
from edge_agent.identity.folder import IdentityFolder
from tests.support.running_demo import Demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with Demo(tmp_path_factory.mktemp("demo")) as demo:
        demo.finish()
        yield demo


def test_the_demo_ends_well_and_leaves_no_process(demo: Demo) -> None:
    assert demo.process.returncode == 0, demo.printed
    assert demo.left_behind() == []


def test_the_cascade_is_nearly_as_good_as_the_large_model_at_a_quarter_of_its_use(demo: Demo) -> None:
    accuracy = demo.figures["accuracy"]
    assert accuracy["cascade"] >= accuracy["heavy"] - 0.005
    assert accuracy["edge"] < accuracy["cascade"]
    assert 0 < demo.figures["escalated_ratio"] <= 0.25


def test_every_picture_is_answered_exactly_once(demo: Demo) -> None:
    figures = demo.figures
    assert figures["n"] == 899
    assert {key: figures[key] for key in ("lost", "refused", "duplicates", "late")} == dict.fromkeys(
        ("lost", "refused", "duplicates", "late"), 0
    )
    assert sum(figures["answered"].values()) == 899


def test_one_trace_spans_device_agent_gateway_and_replica(demo: Demo) -> None:
    assert demo.figures["trace"]["services"] == [
        "nanofleet-agent",
        "nanofleet-controller",
        "nanofleet-device",
        "nanofleet-heavy",
    ]


def test_the_update_came_as_differences_and_cost_less_than_the_model(demo: Demo) -> None:
    update = demo.figures["update"]
    assert update["saved_bytes"] > 0
    for transfer in update["agents"].values():
        assert transfer["difference_chunks"] >= 1
        assert transfer["brought_bytes"] == transfer["wire_bytes"] + transfer["saved_bytes"]


def test_an_agent_is_killed_and_its_neighbour_answers_its_cameras_without_a_loss(demo: Demo) -> None:
    failover = demo.figures["failover"]
    assert {key: failover[key] for key in ("lost", "refused", "late")} == {"lost": 0, "refused": 0, "late": 0}
    assert failover["n"] == 899
    assert failover["after"] > 0
    neighbours = {"gate-1": ["gate-2"], "gate-2": ["gate-1"]}
    assert failover["answered_by"] == neighbours[failover["killed"]]
    assert failover["cameras"] >= 1
    # The broker tells of the death at once; the share of a silent agent would have been 2.5 s.
    assert 0 < failover["switch_ms"]["max"] < 2000
    assert f"{failover['killed']} was killed: its {failover['cameras']} cameras were answered by" in demo.printed


def test_every_agent_was_let_in_by_the_authority_and_keeps_its_key_to_itself(demo: Demo) -> None:
    for agent_id, agent in demo.figures["endpoints"]["agents"].items():
        identity = IdentityFolder(demo.folder / agent_id / "identity").load()
        assert (identity.agent_id, identity.site) == (agent_id, agent["site"])
        assert identity.not_after > datetime.now(UTC)
        keys = list((demo.folder / agent_id / "identity").glob("*/key.pem"))
        assert [key.stat().st_mode & 0o777 for key in keys] == [0o600]


def test_what_an_agent_runs_stands_in_its_journal(demo: Demo) -> None:
    for agent_id in demo.figures["endpoints"]["agents"]:
        state = Journal(demo.folder / agent_id / "journal", clock=SystemClock()).record.current
        assert state is not None
        assert [(slot.model, slot.version, slot.variant) for slot in state.slots] == [("digits-nano", 2, "int8-static")]


def test_the_quantized_variant_is_smaller_than_the_original(demo: Demo) -> None:
    sizes = {name: variant["size_bytes"] for name, variant in demo.figures["variants"]["digits-nano"].items()}
    assert sizes["int8-static"] < sizes["original"]


def test_ctrl_c_stops_everything_also_with_the_embedded_broker(tmp_path: Path) -> None:
    with Demo(tmp_path, "--keep", "--broker", "embedded") as demo:
        demo.wait_for("running until Ctrl-C")
        figures = demo.figures
        assert figures["broker"] == {"name": "amqtt", "protocols": ["3.1.1"]}
        assert figures["accuracy"]["cascade"] >= figures["accuracy"]["heavy"] - 0.005
        assert figures["failover"]["lost"] == 0
        demo.process.send_signal(signal.SIGINT)
        assert demo.finish() == 0, demo.printed
        assert demo.left_behind() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_middle_stops_everything(tmp_path: Path, number: signal.Signals) -> None:
    with Demo(tmp_path) as demo:
        demo.wait_for("$ nanofleet models publish")
        demo.process.send_signal(number)
        assert demo.finish() != 0
        assert demo.left_behind() == []


def test_a_folder_that_is_not_a_demo_s_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "demo" / "precious.txt"
    precious.parent.mkdir()
    precious.touch()
    with Demo(tmp_path) as demo:
        assert demo.finish() == 1
        assert "expected a folder of an earlier demo" in demo.printed
    assert precious.exists()
