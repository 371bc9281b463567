"""The images, as far as they can be checked without an engine: their steps are run, in a folder instead of a root."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from controller.settings import Settings
from edge_agent.settings import AgentSettings
from tests.support.dockerfile import Instruction, read_dockerfile

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "deploy" / "images"
DOCKERFILES = sorted(IMAGES.glob("Dockerfile.*"))
# Chosen: what the lock brings takes 251 MB (measured), most of it ONNX Runtime and NumPy.
AGENT_LIMIT_BYTES = 300 << 20
BUILD_TIMEOUT_S = 600

each_image = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.suffix[1:])


def final(dockerfile: Path) -> dict[str, str]:
    """Return the instructions of the last stage; of those that come more than once, the last."""
    instructions = read_dockerfile(dockerfile)
    return {each.name: each.words for each in instructions if each.stage == instructions[-1].stage}


@each_image
def test_the_linter_finds_nothing(dockerfile: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"

    done = subprocess.run([hadolint, dockerfile], capture_output=True, text=True)

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@each_image
def test_what_is_copied_is_there_and_in_the_context(dockerfile: Path) -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    for instruction in copied_from_context(dockerfile):
        for source in instruction.arguments[:-1]:
            assert (ROOT / source).exists(), source
            assert any(rule[1:] == source or Path(source).match(rule[1:]) for rule in rules if rule[0] == "!"), source


def test_the_context_holds_nothing_that_is_not_named() -> None:
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()


@each_image
def test_it_runs_as_a_user_of_its_own_named_by_number(dockerfile: Path) -> None:
    user, _, group = final(dockerfile)["USER"].partition(":")

    assert int(user) >= 10_000
    assert int(group) >= 10_000


@each_image
def test_everything_that_pip_fetches_is_named_by_hash(dockerfile: Path) -> None:
    installs = [step for each in read_dockerfile(dockerfile) for step in each.words.split("&&") if " install " in step]
    fetching = [step for step in installs if "-m pip" in step and "--no-index" not in step]

    assert fetching
    for step in fetching:
        assert "--require-hashes" in step
        assert "--only-binary=:all:" in step


@pytest.mark.parametrize(
    ("name", "prefix", "settings"),
    [("agent", "NANOFLEET_AGENT_", AgentSettings), ("controller", "NANOFLEET_", Settings)],
)
def test_what_it_sets_is_a_setting(name: str, prefix: str, settings: type[Settings | AgentSettings]) -> None:
    variables = re.findall(r"(NANOFLEET_\w+)=", final(IMAGES / f"Dockerfile.{name}")["ENV"])

    assert variables
    assert {variable.removeprefix(prefix).lower() for variable in variables} <= set(settings.model_fields)


def test_the_wheel_is_built_with_what_the_developers_have() -> None:
    build, dev = ((ROOT / "deploy" / "requirements" / name).read_text() for name in ("build.lock", "dev.lock"))

    assert build.count("--hash=")
    assert set(re.findall(r"^\S+==\S+", build, re.MULTILINE)) <= set(re.findall(r"^\S+==\S+", dev, re.MULTILINE))


def test_the_steps_of_the_agent_image_make_an_agent_and_a_small_one(tmp_path: Path) -> None:
    run_build_stage(IMAGES / "Dockerfile.agent", tmp_path)
    environment = tmp_path / "opt" / "nanofleet"

    command = json.loads(final(IMAGES / "Dockerfile.agent")["ENTRYPOINT"])
    done = subprocess.run([environment / "bin" / command[0], "--help"], capture_output=True, text=True, check=True)
    assert "run an agent until it is told to stop" in done.stdout
    assert size_bytes(environment) < AGENT_LIMIT_BYTES


def test_both_images_are_built_in_the_same_steps() -> None:
    agent, controller = (
        [(each.name, each.words) for each in read_dockerfile(IMAGES / f"Dockerfile.{name}") if each.stage == 0]
        for name in ("agent", "controller")
    )

    assert [(name, words.replace("agent.lock", "controller.lock")) for name, words in agent] == controller


def size_bytes(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


def copied_from_context(dockerfile: Path) -> list[Instruction]:
    return [each for each in read_dockerfile(dockerfile) if each.name == "COPY" and "--from" not in each.words]


def run_build_stage(dockerfile: Path, root: Path) -> None:
    """Run the first stage with `root` in the place of the root of a file system, by this Python."""
    source = root / "src"
    for each in copied_from_context(dockerfile):
        *names, to = each.arguments
        for name in names:
            target = source / to / Path(name).name if to.endswith("/") else source / to
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(ROOT / name, target) if (ROOT / name).is_dir() else shutil.copy(ROOT / name, target)
    for each in read_dockerfile(dockerfile):
        if each.stage == 0 and each.name == "RUN":
            script = each.words.replace("/opt/", f"{root}/opt/").replace("python -m", f"{sys.executable} -m")
            # An interpreter of the script's own, not ours.
            script = script.replace(f"bin/{sys.executable} -m", "bin/python -m")
            subprocess.run(["/bin/sh", "-euc", script], cwd=source, check=True, timeout=BUILD_TIMEOUT_S)
