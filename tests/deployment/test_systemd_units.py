"""The units of `deploy/systemd`: well formed, as hardened as their README says, and in step with the programs."""

import configparser
import re
import subprocess
from pathlib import Path

import pytest

from controller.heavy.local import ChildPolicy
from edge_agent.lifetime import FLUSH_TIMEOUT_S
from edge_agent.settings import AgentSettings
from tests.support.mosquitto import program_path

FOLDER = Path(__file__).parents[2] / "deploy/systemd"
UNITS = ("nanofleet-controller.service", "nanofleet-agent.service")
INSTALLED = "/opt/nanofleet/"
# The overall exposure that the README quotes; lower is better, systemd calls 2.0 and less OK.
EXPOSURE = 1.2


def settings_of(unit: str) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    # As they are written; the default makes them lower case.
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # as the library's documentation says
    parser.read(FOLDER / unit)
    return parser["Service"]


def analysed(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program_path("systemd-analyze"), *words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_finds_no_fault_in_a_unit(tmp_path: Path, unit: str) -> None:
    content = (FOLDER / unit).read_text()
    program = re.search(rf"^ExecStart={INSTALLED}(\S+)", content, re.MULTILINE)
    assert program is not None
    # It looks whether the program is there, and here nothing is installed.
    (stand_in := tmp_path / program[1]).parent.mkdir(parents=True)
    stand_in.touch(mode=0o755)
    (tmp_path / unit).write_text(content.replace(INSTALLED, f"{tmp_path}/"))
    done = analysed("verify", "--man=no", "--recursive-errors=one", tmp_path / unit)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_as_hardened_as_its_readme_says(unit: str) -> None:
    done = analysed("security", "--offline=true", "--no-pager", f"--threshold={round(EXPOSURE * 10)}", FOLDER / unit)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done.stderr
    assert float(found[1]) == EXPOSURE
    assert f"| `{unit}` | {EXPOSURE} |" in (FOLDER / "README.md").read_text()
    assert done.returncode == 0


def test_the_controller_gets_the_time_that_its_heavy_tier_may_take_to_end() -> None:
    # Calls may finish before, spans are stored after.
    assert float(settings_of(UNITS[0])["TimeoutStopSec"]) >= ChildPolicy().stop_timeout_s * 2


def test_the_agent_gets_the_time_that_its_requests_and_spans_may_take() -> None:
    wanted_s = AgentSettings().drain_timeout_s + FLUSH_TIMEOUT_S
    assert float(settings_of(UNITS[1])["TimeoutStopSec"]) >= wanted_s * 2
