"""The playbooks of `ansible/`, run for real: a controller and two agents on hosts that boot systemd, set up over ssh.

The tests of the fleet are one story and run in order: set up, again, looked at,
rotated, upgraded with a host that fails, upgraded.
"""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest

from tests.support.booted_hosts import Host, Hosts, booted_hosts
from tests.support.locked_environment import ROOT, locked_environment
from tests.support.playbooks import PLAYBOOKS, Operator, bundle, sources_of_version

OLD, NEW = "0.1.0", "0.1.1"
FLEET, AGENTS = "fleet", ("gate-1", "gate-2")
UNITS = {FLEET: "nanofleet-controller", "gate-1": "nanofleet-agent", "gate-2": "nanofleet-agent"}
# Without Ray, which is a gigabyte on each host; the heavy tier is elsewhere then.
CONTROLLER_LOCK = ROOT / "deploy/requirements/gateway.lock"


def test_the_playbooks_pass_the_lint_at_its_production_profile() -> None:
    programs = locked_environment("ansible")
    command = [str(programs / "ansible-lint"), "--profile", "production", "--offline", "--strict"]
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, cwd=PLAYBOOKS, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass(frozen=True, slots=True)
class Bundles:
    controller: dict[str, Path]
    agent: dict[str, Path]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    def make(side: str, version: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{side}-{version}")
        options = ["--lock", str(CONTROLLER_LOCK)] if side == "controller" else []
        return bundle(side, source=sources_of_version(folder / "sources", version), output=folder, options=options)

    locked_environment("ansible")
    with ThreadPoolExecutor(4) as threads:
        made = {
            side: {version: threads.submit(make, side, version) for version in (OLD, NEW)}
            for side in ("controller", "agent")
        }
        controller, agent = ({version: path.result() for version, path in made[side].items()} for side in made)
    return Bundles(controller, agent)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with booted_hosts(tmp_path_factory.mktemp("hosts"), [FLEET, *AGENTS]) as booted:
        yield booted


@pytest.fixture(scope="module")
def operator(hosts: Hosts, bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Operator:
    made = Operator(hosts, tmp_path_factory.mktemp("operator"))
    settings = {
        "grpc_bind": "0.0.0.0:7443",
        "enrolment_bind": "0.0.0.0:7444",
        "http_bind": "0.0.0.0:7080",
        "advertised_host": hosts[FLEET].address,
        # The discard port: nobody answers there.
        "heavy": {"mode": "url", "url": "http://127.0.0.1:9"},
    }
    made.write_inventory(
        {
            "controller": {
                "hosts": [FLEET],
                "vars": {"controller_bundle": str(bundles.controller[OLD]), "controller_settings": settings},
            },
            "edge_agents": {
                "hosts": AGENTS,
                "vars": {"edge_agent_bundle": str(bundles.agent[OLD]), "edge_agent_site": "berlin"},
            },
        }
    )
    return made


def versions(hosts: Hosts) -> dict[str, str]:
    """Return which version runs on each host, by the process that its unit has."""
    found = {}
    for name, unit in UNITS.items():
        pid = hosts[name].run("systemctl", "show", "--property=MainPID", "--value", unit)
        # What it has loaded, and not what a link says by now.
        loaded = hosts[name].run("grep", "--only-matching", "--max-count=1", "/releases/[0-9.]*", f"/proc/{pid}/maps")
        found[name] = loaded.removeprefix("/releases/")
    return found


def asked(hosts: Hosts, *words: str) -> str:
    """Return what `nanofleet` says to the admin on the controller's host."""
    credential = "--credential=/etc/nanofleet/admin/credential.json"
    program = "/opt/nanofleet/controller/current/bin/nanofleet"
    return hosts[FLEET].run("runuser", "-u", "nanofleet", "--", program, credential, *words)


def test_site_sets_up_a_fleet_on_bare_machines(operator: Operator, hosts: Hosts) -> None:
    played = operator.play("site.yml")
    assert played.exit_code == 0, played.output
    assert versions(hosts) == dict.fromkeys(UNITS, OLD)
    listed = asked(hosts, "devices", "list")
    assert all(f"{name} " in listed for name in AGENTS), listed
    assert listed.count("online") == len(AGENTS)


def test_site_changes_nothing_the_second_time(operator: Operator) -> None:
    played = operator.play("site.yml")
    assert played.exit_code == 0, played.output
    assert {name: recap.changed for name, recap in played.recaps.items()} == dict.fromkeys(UNITS, 0), played.output


def test_no_token_is_in_what_ansible_says_or_a_host_logs(operator: Operator, hosts: Hosts) -> None:
    assert "nft1." not in (operator.folder / "site.yml.log").read_text()
    for name in UNITS:
        assert "nft1." not in hosts[name].run("journalctl", "--no-pager")


def test_the_units_run_confined(hosts: Hosts) -> None:
    for name, unit in UNITS.items():
        pid = hosts[name].run("systemctl", "show", "--property=MainPID", "--value", unit)
        status = hosts[name].run("cat", f"/proc/{pid}/status")
        assert "NoNewPrivs:\t1" in status
        # A filter of system calls.
        assert "Seccomp:\t2" in status
        assert "CapEff:\t0000000000000000" in status


def test_logs_are_collected_from_every_host(operator: Operator) -> None:
    folder = operator.folder / "logs"
    played = operator.play("collect_logs.yml", collect_folder=str(folder))
    assert played.exit_code == 0, played.output
    assert "controller is ready" in (folder / FLEET / "journal.txt").read_text()
    for name in AGENTS:
        assert "agent is up" in (folder / name / "journal.txt").read_text()


def test_rotate_gives_the_fleet_another_authority_and_loses_no_agent(operator: Operator, hosts: Hosts) -> None:
    before = asked(hosts, "authority", "status", "--output=json")
    played = operator.play("rotate.yml")
    assert played.exit_code == 0, played.output
    after = asked(hosts, "authority", "status", "--output=json")
    assert signing(after) != signing(before)
    assert asked(hosts, "devices", "list").count("online") == len(AGENTS)


def test_an_upgrade_stops_at_the_host_that_fails_and_takes_it_back(
    operator: Operator, hosts: Hosts, bundles: Bundles
) -> None:
    refuse(hosts["gate-1"], NEW)
    played = operator.play("upgrade.yml", **new_bundles(bundles))
    assert played.exit_code != 0
    assert f"failed on gate-1, which runs {OLD}-" in " ".join(played.output.split())
    # The controller before it is whole on the new release, the agent after it was never touched.
    assert versions(hosts) == {FLEET: NEW, "gate-1": OLD, "gate-2": OLD}
    assert "gate-2" not in played.recaps
    assert asked(hosts, "devices", "list").count("online") == len(AGENTS)


def test_the_same_upgrade_goes_on_where_it_stopped_once_the_host_is_well(
    operator: Operator, hosts: Hosts, bundles: Bundles
) -> None:
    forgive(hosts["gate-1"])
    played = operator.play("upgrade.yml", **new_bundles(bundles))
    assert played.exit_code == 0, played.output
    assert versions(hosts) == dict.fromkeys(UNITS, NEW)
    assert asked(hosts, "devices", "list").count("online") == len(AGENTS)


def new_bundles(bundles: Bundles) -> dict[str, str]:
    return {"controller_bundle": str(bundles.controller[NEW]), "edge_agent_bundle": str(bundles.agent[NEW])}


def refuse(host: Host, version: str) -> None:
    """Let a release not start on this host, as one does that needs what only this host lacks."""
    folder = host.files / "etc/systemd/system/nanofleet-agent.service.d"
    folder.mkdir()
    check = f"! readlink /opt/nanofleet/agent/current | grep --quiet releases/{version}"
    (folder / "refuse.conf").write_text(f"[Service]\nExecStartPre=/bin/sh -c '{check}'\n")
    host.run("systemctl", "daemon-reload")


def forgive(host: Host) -> None:
    host.run("rm", "-r", "/etc/systemd/system/nanofleet-agent.service.d")
    host.run("systemctl", "daemon-reload")


def signing(authorities: str) -> str:
    """Return which authority signs."""
    (found,) = [each["sha256"] for each in orjson.loads(authorities)["authorities"] if each["state"] == "active"]
    return str(found)
