"""The examples of docs/device-guide.md as they are in the repository, on a real broker and a real agent's front."""

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.support.edge_front import SITE, serving
from tests.support.edge_plane import cascade_of, echo_model
from tests.support.mosquitto import Mosquitto, running_mosquitto
from tests.support.played_agents import played
from tests.support.sensor_tools import cpp_compiler, micropython

ROOT = Path(__file__).parents[2]
EXAMPLES, SUPPORT = ROOT / "examples", ROOT / "tests" / "support"
TIMEOUT_S = 60.0


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    (tmp_path / "broker").mkdir()
    with running_mosquitto(tmp_path / "broker") as running:
        yield running


async def output_of(*command: str | Path, given: bytes = b"") -> str:
    """Return what a command prints; `given` is what it reads."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(TIMEOUT_S):
        output, _ = await process.communicate(given)
    assert process.returncode == 0, output.decode()
    return output.decode()


async def built_sketch(folder: Path, settings: Mapping[str, str | int]) -> Path:
    """Compile the sketch with `settings` in the place of those in its settings.h; return the program."""
    compiler = cpp_compiler()
    source = EXAMPLES / "arduino" / "sensor"
    text = (source / "settings.h").read_text()
    for name, value in settings.items():
        word = value if isinstance(value, int) else f'"{value}"'
        text, count = re.subn(rf"#define {name} .*", f"#define {name} {word}", text)
        assert count == 1
    (folder / "settings.h").write_text(text)
    sketch = folder / "sensor.cpp"
    sketch.write_bytes((source / "sensor.ino").read_bytes())
    program = folder / "sensor"
    # Unused parameters are of the stand-ins for Arduino's libraries.
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", f'-DSKETCH="{sketch}"']
    sources: list[str | Path] = ["-I", SUPPORT / "arduino", "-I", folder, SUPPORT / "arduino" / "main.cpp"]
    await output_of(compiler, *options, *sources, "-o", program, "-lmosquitto")
    return program


def of(broker: Mosquitto, **other: str | int) -> dict[str, str | int]:
    names = {"SITE": SITE, "MODEL": "digits", "INPUT": "x"}
    return {"BROKER_HOST": broker.host, "BROKER_PORT": broker.port, **names, **other}


async def test_the_arduino_sketch_is_answered(broker: Mosquitto, tmp_path: Path) -> None:
    program = await built_sketch(tmp_path, of(broker))
    async with serving(broker, echo_model(cascade=cascade_of())) as front:
        lines = (await output_of(program)).splitlines()
        assert (front.counters.received, front.counters.replied, front.counters.malformed_topic) == (2, 2, 0)
    assert len(lines) == 2
    for kth, line in enumerate(lines, start=1):
        assert re.match(rf"answer [0-9a-f]+-{kth}: \{{", line)
        assert '"status":200' in line
        assert '"data":[0.0,0.333' in line


async def test_the_arduino_sketch_goes_on_when_nobody_answers(broker: Mosquitto, tmp_path: Path) -> None:
    program = await built_sketch(tmp_path, of(broker, SITE="nowhere"))
    assert (await output_of(program)).splitlines() == ["no answer in time"] * 2


def silent(broker: Mosquitto, count: int) -> AbstractContextManager[object]:
    """So many agents that say they are there and answer nothing."""
    return played(broker, *(f"silent-{number}" for number in range(count)), behaviour="ignore")


async def test_the_arduino_sketch_finds_another_agent_when_one_is_silent(broker: Mosquitto, tmp_path: Path) -> None:
    program = await built_sketch(tmp_path, of(broker))
    async with serving(broker, echo_model()):
        with silent(broker, 1):
            lines = (await output_of(program)).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("answer ") for line in lines)


async def built_c_client(folder: Path) -> Path:
    program = folder / "ask"
    options = ["-x", "c", "-std=gnu11", "-Wall", "-Wextra", "-Werror"]
    await output_of(cpp_compiler(), *options, EXAMPLES / "c" / "ask.c", "-o", program, "-lmosquitto")
    return program


async def asked_in_c(program: Path, broker: Mosquitto, *, model: str = "digits") -> str:
    words = [broker.host, str(broker.port), SITE, "camera-c", model]
    return await output_of(program, *words, given=b'[{"name":"x","datatype":"FP32","shape":[1,3],"data":[0,9,0]}]')


async def test_the_c_client_is_answered(broker: Mosquitto, tmp_path: Path) -> None:
    program = await built_c_client(tmp_path)
    async with serving(broker, echo_model()):
        answer = json.loads(await asked_in_c(program, broker))
    assert (answer["parameters"]["status"], answer["outputs"][0]["data"]) == (200, [0.0, 9.0, 0.0])


async def test_the_c_client_finds_another_agent_when_some_are_silent(broker: Mosquitto, tmp_path: Path) -> None:
    program = await built_c_client(tmp_path)
    async with serving(broker, echo_model()):
        with silent(broker, 3):
            answer = json.loads(await asked_in_c(program, broker))
    assert answer["parameters"]["status"] == 200


async def test_the_micropython_example_is_answered(broker: Mosquitto) -> None:
    program = (
        f"import sys; sys.path[:0] = [{str(EXAMPLES / 'micropython')!r}, {str(SUPPORT / 'micropython')!r}]\n"
        f"import sensor; sensor.main({broker.host!r}, {broker.port}, {SITE!r}, 'digits', 'x')"
    )
    async with serving(broker, echo_model(cascade=cascade_of())):
        lines = (await output_of(micropython(), "-c", program)).splitlines()
    assert len(lines) == 2
    tier, _, values = lines[0].partition(" ")
    assert (tier, [round(float(value), 4) for value in values.strip("[]").split(",")]) == ("edge", [0.1, 0.9, 0.2])


async def test_the_micropython_example_says_why_it_was_refused(broker: Mosquitto) -> None:
    program = (
        f"import sys; sys.path[:0] = [{str(EXAMPLES / 'micropython')!r}, {str(SUPPORT / 'micropython')!r}]\n"
        f"import sensor; sensor.main({broker.host!r}, {broker.port}, {SITE!r}, 'ghost', 'x')"
    )
    async with serving(broker, echo_model()):
        output = await output_of(micropython(), "-c", program)
    assert "refused:" in output
    assert "ghost" in output


async def test_the_micropython_example_finds_another_agent_when_one_is_silent(broker: Mosquitto) -> None:
    program = (
        f"import sys; sys.path[:0] = [{str(EXAMPLES / 'micropython')!r}, {str(SUPPORT / 'micropython')!r}]\n"
        f"import sensor; sensor.main({broker.host!r}, {broker.port}, {SITE!r}, 'digits', 'x')"
    )
    async with serving(broker, echo_model()):
        with silent(broker, 1):
            lines = (await output_of(micropython(), "-c", program)).splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["edge", "edge"]
