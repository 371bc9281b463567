"""The playbooks of `ansible/`, run as an operator runs them: bundles, an inventory of hosts, `ansible-playbook`."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tests.support.booted_hosts import Hosts
from tests.support.locked_environment import ROOT, locked_environment

PLAYBOOKS = ROOT / "ansible"
PLAYBOOK_TIMEOUT_S = 600.0
BUNDLE_TIMEOUT_S = 300.0
_SOURCES = ("core", "protos", "controller", "edge_agent", "pyproject.toml", "README.md")
_RECAP = re.compile(r"^(\S+) +: ok=(\d+) +changed=(\d+) +unreachable=(\d+) +failed=(\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Recap:
    """What a playbook did on one host."""

    changed: int
    failed: int


@dataclass(frozen=True, slots=True)
class Played:
    exit_code: int
    output: str
    # Of the hosts that it came to.
    recaps: Mapping[str, Recap]


@dataclass(frozen=True, slots=True)
class Operator:
    """Plays playbooks on `hosts`; `folder` is the home of whoever does."""

    hosts: Hosts
    folder: Path

    def write_inventory(self, groups: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the inventory: per group, `hosts` (names) and `vars`."""
        inventory = {
            group: {
                "hosts": {name: {"ansible_host": self.hosts[name].address} for name in content["hosts"]},
                "vars": content["vars"],
            }
            for group, content in groups.items()
        }
        connection = {
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(self.hosts.key),
            "ansible_ssh_common_args": f"-o UserKnownHostsFile={self.hosts.known_hosts}",
        }
        # YAML is a superset of JSON.
        self._inventory.write_bytes(orjson.dumps({**inventory, "all": {"vars": connection}}))

    def play(self, playbook: str, **variables: str) -> Played:
        """Run a playbook to its end, whatever that is."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            # Ansible refuses to start under another one.
            "LC_ALL": "C.UTF-8",
            "ANSIBLE_NOCOLOR": "1",
        }
        extra = [word for name, value in variables.items() for word in ("-e", f"{name}={value}")]
        command = [*self.hosts.control, str(locked_environment("ansible") / "ansible-playbook")]
        done = subprocess.run(
            [*command, "-i", str(self._inventory), *extra, playbook],
            cwd=PLAYBOOKS,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PLAYBOOK_TIMEOUT_S,
        )
        recaps = {name: Recap(int(changed), int(failed)) for name, _, changed, _, failed in _RECAP.findall(done.stdout)}
        (self.folder / f"{playbook}.log").write_text(done.stdout + done.stderr)
        return Played(done.returncode, done.stdout + done.stderr, recaps)

    @property
    def _inventory(self) -> Path:
        return self.folder / "inventory.yml"


def sources_of_version(folder: Path, version: str) -> Path:
    """Return a copy of our sources that calls itself `version`."""
    for name in _SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / name)
    pyproject = folder / "pyproject.toml"
    ours = re.compile(r'^version = ".*"$', re.MULTILINE)
    pyproject.write_text(ours.sub(f'version = "{version}"', pyproject.read_text()))
    return folder


def bundle(side: str, *, source: Path, output: Path, options: Sequence[str] = ()) -> Path:
    """Make a bundle with `ansible/bundle.py`, in the environment that the playbooks run in."""
    command = [str(locked_environment("ansible") / "python"), str(PLAYBOOKS / "bundle.py"), side]
    done = subprocess.run(
        [*command, "--source", source, "--output", output, *options],
        capture_output=True,
        text=True,
        timeout=BUNDLE_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())
