"""The `nanofleet` command against a real controller on a real port: results, progress, exit codes."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from controller.cli.app import app
from controller.traces.model import SpanKind, SpanRecord
from core.fleet_state import Problem
from tests.support.operator_side import HOSTILE, RunningController, ScriptedAgent, running_controller

Run = Callable[..., Result]
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("operator")
    (made / "nano.onnx").write_bytes(b"a small model")
    (made / "data.npz").write_bytes(b"a data set")
    (made / "hostile.onnx").write_bytes(HOSTILE)
    return made


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[RunningController]:
    with running_controller(tmp_path) as running:
        yield running


@pytest.fixture
def run(controller: RunningController) -> Run:
    def call(*words: str) -> Result:
        return invoke(*words, url=controller.url, credential=controller.credential_path)

    return call


def invoke(*words: str, url: str | None = None, credential: Path | None = None) -> Result:
    who = None if credential is None else str(credential)
    environment = {"COLUMNS": "160", "TERM": "dumb", "NANOFLEET_CONTROLLER": url, "NANOFLEET_CREDENTIAL": who}
    return CliRunner().invoke(app, list(words), env=environment, prog_name="nanofleet")


def assert_failed(result: Result, exit_code: int, *words: str) -> None:
    assert result.exit_code == exit_code, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr


@pytest.fixture
def published(run: Run, folder: Path) -> Any:
    result = run("models", "publish", "nano", str(folder / "nano.onnx"), "-o", "json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# ---- models -----------------------------------------------------------------------------------------------------


def test_publish_uploads_watches_and_shows_the_variants(run: Run, folder: Path) -> None:
    data = str(folder / "data.npz")
    words = ("--recipe", "int8-static", "--recipe", "fp16", "--calibration", data, "--evaluation", data)
    cascade = ("--escalate-to", "large", "--score-output", "scores", "--score-kind", "logits")
    result = run("models", "publish", "nano", str(folder / "nano.onnx"), *words, *cascade)
    assert result.exit_code == 0, result.output
    for word in ("original", "int8-static", "fp16", "96.25%", "0.120 ms", "to large below 0.875"):
        assert word in result.stdout
    assert "upload nano.onnx" in result.stderr
    assert "done" in result.stderr


def test_publish_does_not_upload_what_is_there(run: Run, folder: Path, published: Any) -> None:
    result = run("models", "publish", "nano", str(folder / "nano.onnx"), "-o", "json")
    assert json.loads(result.stdout)["version"] == published["version"] + 1
    assert "nano.onnx (is there)" in result.stderr


def test_publish_of_a_hostile_file_fails_with_the_reason(run: Run, folder: Path) -> None:
    result = run("models", "publish", "nano", str(folder / "hostile.onnx"))
    assert_failed(result, 1, "error:", "expected an ONNX model")
    assert result.stdout == ""


def test_publish_says_what_the_controller_refused(run: Run, folder: Path) -> None:
    result = run("models", "publish", "nano", str(folder / "nano.onnx"), "--recipe", "int8-static")
    assert_failed(result, 1, "int8-static needs calibration data")


@pytest.mark.parametrize(
    "words",
    [
        ("--escalate-to", "large"),
        ("--score-output", "scores"),
        ("--recipe", "int2"),
        ("--escalate-to", "a/b", "--score-output", "scores"),
        ("--max-batch", "0"),
        ("--calibration", "nowhere.npz"),
    ],
)
def test_publish_with_options_that_do_not_fit_is_wrong_usage(run: Run, folder: Path, words: tuple[str, ...]) -> None:
    assert_failed(run("models", "publish", "nano", str(folder / "nano.onnx"), *words), 2)


@pytest.mark.usefixtures("published")
def test_models_are_listed_and_shown(run: Run) -> None:
    assert "nano" in run("models", "list").stdout
    assert "original" in run("models", "show", "nano").stdout
    [model] = json.loads(run("models", "list", "-o", "json").stdout)["models"]
    assert (model["name"], model["latest_version"]) == ("nano", 1)


@pytest.mark.parametrize("name", ["ghost", "a/b", "../health", "?x"])
def test_showing_an_unknown_model_is_refused(run: Run, name: str) -> None:
    assert_failed(run("models", "show", name), 1, "error:")


# ---- deploy and devices -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("published")
def test_deploy_waits_until_the_agent_is_ready(run: Run, controller: RunningController) -> None:
    agent = ScriptedAgent("gate-1", "berlin")
    controller.call(agent.connect)
    result = run("deploy", "nano", "--variant", "original", "--site", "berlin")
    controller.call(agent.disconnect)
    assert result.exit_code == 0, result.output
    assert "nano:1 original for site berlin: ready on 1 of 1 agents" in result.stdout
    assert "gate-1" in result.stderr


@pytest.mark.usefixtures("published")
def test_deploy_fails_when_an_agent_does_and_says_why(run: Run, controller: RunningController) -> None:
    agents = [
        ScriptedAgent("gate-1", "berlin"),
        ScriptedAgent("gate-2", "berlin", fails_with=Problem("unavailable", "disk is full; free 3 MB")),
        ScriptedAgent("gate-3", "berlin", refuses_with=Problem("forbidden", "not signed for this site")),
    ]
    for agent in agents:
        controller.call(agent.connect)
    result = run("deploy", "nano:1", "--variant", "original", "--fleet")
    for agent in agents:
        controller.call(agent.disconnect)
    assert_failed(result, 1, "gate-2: disk is full; free 3 MB", "gate-3: not signed for this site")
    assert "ready on 1 of 3 agents" in result.stdout


@pytest.mark.usefixtures("published")
def test_deploy_does_not_wait_for_an_agent_that_is_offline(run: Run, controller: RunningController) -> None:
    agent = ScriptedAgent("gate-1", "berlin")
    controller.call(agent.connect)
    controller.call(agent.disconnect)
    result = run("deploy", "nano", "--variant", "original", "--agent", "gate-1")
    assert result.exit_code == 0, result.output
    assert "1 offline get it when they connect" in result.stdout


@pytest.mark.usefixtures("published")
def test_deploy_to_a_site_without_agents_waits_for_the_first(run: Run) -> None:
    result = run("deploy", "nano", "--variant", "original", "--site", "nowhere")
    assert result.exit_code == 0, result.output
    assert "the first that connects gets it" in result.stdout


@pytest.mark.usefixtures("published")
def test_deploy_gives_up_after_its_time(run: Run, controller: RunningController) -> None:
    class SilentAgent(ScriptedAgent):
        def _reports(self, _desired: object) -> Iterator[Any]:
            return iter(())

    agent = SilentAgent("gate-1", "berlin")
    controller.call(agent.connect)
    result = run("deploy", "nano", "--variant", "original", "--fleet", "--timeout", "0")
    controller.call(agent.disconnect)
    assert_failed(result, 1, "gate-1: still pushed after 0 s")


@pytest.mark.usefixtures("published")
def test_deploy_need_not_wait(run: Run, controller: RunningController) -> None:
    agent = ScriptedAgent("gate-1", "berlin")
    controller.call(agent.connect)
    result = run("deploy", "nano", "--variant", "original", "--fleet", "--no-wait", "-o", "json")
    controller.call(agent.disconnect)
    assert json.loads(result.stdout)["agents"] == [{"id": "gate-1", "position": {"epoch": 1, "generation": 1}}]


@pytest.mark.parametrize(
    "words",
    [
        ("nano", "--variant", "original"),
        ("nano", "--variant", "original", "--fleet", "--site", "berlin"),
        ("nano:latest", "--variant", "original", "--fleet"),
        ("nano:0", "--variant", "original", "--fleet"),
        ("nano:2147483649", "--variant", "original", "--fleet"),
        ("nano:" + "9" * 5000, "--variant", "original", "--fleet"),
        ("na/no", "--variant", "original", "--fleet"),
        ("nano", "--fleet"),
    ],
)
def test_a_deployment_that_is_not_clear_is_wrong_usage(run: Run, words: tuple[str, ...]) -> None:
    assert_failed(run("deploy", *words), 2)


@pytest.mark.usefixtures("published")
def test_deploy_of_an_unknown_variant_is_refused(run: Run) -> None:
    assert_failed(run("deploy", "nano", "--variant", "int4", "--fleet"), 1, "no variant 'int4'")


@pytest.mark.usefixtures("published")
def test_devices_are_listed_and_shown_with_their_problems(run: Run, controller: RunningController) -> None:
    agents = [
        ScriptedAgent("gate-1", "berlin"),
        ScriptedAgent("gate-2", "munich", fails_with=Problem("unavailable", "disk is full; free 3 MB")),
    ]
    for agent in agents:
        controller.call(agent.connect)
    run("deploy", "nano", "--variant", "original", "--fleet")
    controller.call(agents[0].disconnect)
    listed, shown = run("devices", "list").stdout, run("devices", "show", "gate-2").stdout
    controller.call(agents[1].disconnect)
    for word in ("gate-1", "offline", "gate-2", "online, failing", "nano:1 original failed"):
        assert word in listed
    for word in ("munich", "1 original", "failed", "100 B of 100 B", "disk is full; free 3 MB"):
        assert word in shown


@pytest.mark.usefixtures("published")
def test_a_metered_device_is_allowed_what_it_waits_for(run: Run, controller: RunningController) -> None:
    agent = ScriptedAgent("gate-1", "berlin")
    controller.call(agent.connect)
    run("deploy", "nano", "--variant", "original", "--fleet")
    allowed = run("devices", "allow-transfer", "gate-1", "nano")
    controller.call(agent.disconnect)

    assert allowed.exit_code == 0, allowed.output
    assert "gate-1 may fetch nano:1 original in full" in allowed.stdout


def test_allowing_what_a_device_shall_not_run_is_refused(run: Run, controller: RunningController) -> None:
    agent = ScriptedAgent("gate-1", "berlin")
    controller.call(agent.connect)
    controller.call(agent.disconnect)

    assert_failed(run("devices", "allow-transfer", "gate-1", "other"), 1, "deploy it first")
    assert_failed(run("devices", "allow-transfer", "gate-1", "No/Model"), 2)


def test_showing_an_unknown_device_is_refused(run: Run) -> None:
    assert_failed(run("devices", "show", "ghost"), 1, "never seen here")


# ---- traces -----------------------------------------------------------------------------------------------------


def made_span(span_id: str, parent: str | None, service: str, *, start_us: int, duration_us: int) -> SpanRecord:
    return SpanRecord(
        TRACE_ID,
        span_id,
        parent,
        f"stage {span_id[-1]}",
        SpanKind.INTERNAL,
        service,
        "host-1",
        start_us,
        duration_us,
        is_error=service == "nanofleet-heavy",
        attributes={"nanofleet.route.reason": "low_confidence"} if service == "nanofleet-agent" else {},
    )


@pytest.fixture
def traced(controller: RunningController) -> None:
    spans = [
        made_span("00000000000000a1", None, "nanofleet-agent", start_us=1_000, duration_us=8_000),
        made_span("00000000000000a2", "00000000000000a1", "nanofleet-heavy", start_us=3_000, duration_us=4_000),
    ]

    async def take_in(side: Any) -> None:
        side.traces.take_in(spans)
        await side.traces.flush()

    controller.call(take_in)


@pytest.mark.usefixtures("traced")
def test_traces_are_listed(run: Run) -> None:
    result = run("traces", "list")
    for word in (TRACE_ID, "stage 1", "edge heavy", "8.000 ms"):
        assert word in result.stdout
    assert TRACE_ID not in run("traces", "list", "--service", "nanofleet-device").stdout


@pytest.mark.usefixtures("traced")
def test_a_trace_is_drawn_per_tier_and_stage(run: Run) -> None:
    lines = run("traces", "show", TRACE_ID).stdout.splitlines()
    edge = next(line for line in lines if line.startswith("edge ") and "stage 1" in line)
    heavy = next(line for line in lines if line.startswith("heavy ") and "stage 2" in line)
    assert (edge.count("█") > heavy.count("█"), "8.000 ms" in edge, "4.000 ms" in heavy) == (True, True, True)
    assert heavy.index("█") > edge.index("█")
    assert "edge: reason low_confidence" in lines


def test_showing_an_unknown_trace_is_refused(run: Run) -> None:
    assert_failed(run("traces", "show", "00"), 1, "trace '00'")


# ---- failures and start-up --------------------------------------------------------------------------------------


def test_without_a_controller_the_command_says_how_to_start_one(unused_tcp_port: int) -> None:
    result = invoke("models", "list", url=f"http://127.0.0.1:{unused_tcp_port}")
    assert_failed(result, 3, "nanofleet controller run", f"127.0.0.1:{unused_tcp_port}")


def test_the_option_wins_over_the_environment(controller: RunningController, unused_tcp_port: int) -> None:
    elsewhere, credential = f"http://127.0.0.1:{unused_tcp_port}", controller.credential_path
    result = invoke("--controller", controller.url, "models", "list", url=elsewhere, credential=credential)
    assert result.exit_code == 0, result.output


def test_an_address_without_a_scheme_is_wrong_usage() -> None:
    assert_failed(invoke("--controller", "127.0.0.1:7080", "models", "list"), 2, "http://")


def test_a_peer_cannot_write_markup_to_the_terminal(run: Run) -> None:
    assert_failed(run("devices", "show", "[red]ghost[/red]"), 1, "[red]ghost[/red]")


@pytest.mark.usefixtures("published")
def test_a_peer_cannot_control_the_terminal(run: Run, controller: RunningController) -> None:
    agent = ScriptedAgent("gate-1", "berlin", fails_with=Problem("internal", "\x1b]0;owned\x07[red]full"))
    controller.call(agent.connect)
    deployed = run("deploy", "nano", "--variant", "original", "--fleet")
    shown = run("devices", "show", "gate-1")
    controller.call(agent.disconnect)
    for text in (deployed.stderr, shown.stdout):
        assert "\x1b]" not in text
        assert "?]0;owned?[red]full" in text


def test_the_version_is_printed() -> None:
    assert invoke("--version").stdout.startswith("nanofleet ")


def test_a_configuration_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "controller.toml"
    config.write_text("no_such_setting = 1\n")
    assert_failed(invoke("controller", "run", "--config", str(config)), 1, "no_such_setting", "unknown key")


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from controller.cli.app import app; app(['--help'], standalone_mode=False); "
        "heavy = {'onnx', 'onnxruntime', 'sqlalchemy', 'fastapi', 'starlette', 'ray', 'grpc', 'numpy'}; "
        "sys.exit(f'imported {heavy & sys.modules.keys()}' if heavy & sys.modules.keys() else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "deploy" in result.stdout
