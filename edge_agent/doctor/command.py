"""Which checks there are for an agent, and how their findings are shown."""

import json
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from core.addresses import Address, parse_address
from core.doctor import Check, Finding, document, is_well, ok, problem, render, run_checks, skipped
from core.errors import NanofleetError
from core.machine_checks import (
    certificate_lasts,
    clock_is_set,
    disk_has_room,
    files_are_private,
    folder_works,
    memory_suffices,
    onnx_runtime_works,
    open_files_suffice,
    peer_admits_us,
    port_answers,
    port_is_free,
)
from core.tls_files import client_context
from edge_agent.doctor.broker import BrokerIdentity, check_broker
from edge_agent.doctor.outbox import outbox_takes_rows
from edge_agent.health.state_folder import StateFolder
from edge_agent.health.status_file import read_status
from edge_agent.identity.folder import Identity, IdentityFolder
from edge_agent.settings import AgentSettings, load_settings

# Measured (benchmarks.footprint): an idle agent with a small model stays below 100 MB; its children take as much again.
_NEED_MEMORY_BYTES = 200 << 20
# Chosen: broker, controller, local faces, models and children, with room.
_NEED_FILES = 1024
# Certificates last a week and are renewed after 4.2 days; one that is this old was not.
_SPARE = timedelta(days=2)


def examine(config: Path | None, *, as_json: bool) -> int:
    """Print what is found; return 0 when there is no problem, 1 otherwise."""
    findings = findings_of(config, os.environ)
    if as_json:
        sys.stdout.write(json.dumps(document(findings), indent=2) + "\n")
    else:
        is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        sys.stdout.write("\n".join(render(findings, is_coloured=is_coloured)) + "\n")
    return 0 if is_well(findings) else 1


def findings_of(config: Path | None, environment: Mapping[str, str]) -> list[Finding]:
    try:
        settings = load_settings(config)
    except NanofleetError as error:
        return [problem("settings", str(error), expected="settings that fit", remedy="correct what is named there")]
    whose = "those of the defaults and the environment" if config is None else str(config)
    try:
        checks = checks_of(settings, environment)
    except OSError as error:
        remedy = f"run the doctor as the user of the service: {settings.state_dir} is its own"
        found = f"{error.filename}: {error.strerror}"
        return [ok("settings", whose), problem("folder", found, expected="a folder that we may read", remedy=remedy)]
    return [ok("settings", whose), *run_checks(checks)]


def checks_of(settings: AgentSettings, environment: Mapping[str, str]) -> dict[str, Check]:
    """Return every check, by name."""
    folder = StateFolder(settings.state_dir)
    is_running = folder.is_held()
    identity = _identity(folder)
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return {
        "agent": lambda: _life(folder, is_running=is_running),
        "clock": lambda: clock_is_set(datetime.now(UTC)),
        "folder": lambda: folder_works(settings.state_dir),
        "disk": lambda: disk_has_room(
            settings.state_dir, need_bytes=settings.sync.reserve_bytes, what_for="sync.reserve_bytes"
        ),
        "outbox": lambda: outbox_takes_rows(folder, is_running=is_running),
        "memory": lambda: memory_suffices(_NEED_MEMORY_BYTES),
        "open files": lambda: open_files_suffice(hard_limit, need=_NEED_FILES),
        "identity": lambda: _enrolment(identity),
        "key files": lambda: _keys(settings.state_dir / "identity"),
        "certificate": lambda: _certificate(identity),
        "controller": lambda: _controller(settings, identity, folder),
        "enrolment port": lambda: _enrolment_port(settings, identity),
        "broker": lambda: _broker(settings, identity, is_running=is_running),
        "local port": lambda: _local_port(settings.grpc_bind, is_running=is_running),
        "ONNX Runtime": lambda: onnx_runtime_works(environment),
    }


def _identity(folder: StateFolder) -> Identity | NanofleetError:
    try:
        return IdentityFolder(folder.identity).load()
    except NanofleetError as error:
        return error


def _life(folder: StateFolder, *, is_running: bool) -> Finding:
    if not is_running:
        return skipped("agent", "none runs on this folder; `nanofleet-agent run` starts it")
    status = read_status(folder.status)
    if status.clock_problem or status.certificate.clock_problem:
        found = status.clock_problem or status.certificate.clock_problem
        return problem("agent", found, expected="a clock that agrees with what is signed", remedy="set the clock")
    failed = [model for model in status.models if model.problem]
    if failed:
        remedy = (
            f"see the message; `nanofleet-agent retry {failed[0].model}` after it is mended, with the agent stopped"
        )
        return problem("agent", f"{failed[0].model}: {failed[0].problem}", expected="models that run", remedy=remedy)
    return ok("agent", f"runs as process {status.agent.pid}, version {status.agent.software_version}")


def _enrolment(identity: Identity | NanofleetError) -> Finding:
    match identity:
        case Identity():
            return ok("identity", f"agent {identity.agent_id} of site {identity.site}, {identity.trust_domain}")
        case error:
            remedy = "`nanofleet devices token --site SITE` at an operator's, `nanofleet-agent enrol TOKEN` here"
            return problem("identity", str(error), expected="an enrolled machine", remedy=remedy)


def _keys(folder: Path) -> Finding:
    if not folder.is_dir():
        return skipped("key files", "there are none yet")
    return files_are_private(sorted(folder.rglob("key.pem")))


def _certificate(identity: Identity | NanofleetError) -> Finding:
    if not isinstance(identity, Identity):
        return skipped("certificate", "there is none")
    return certificate_lasts(
        "certificate",
        identity.not_before,
        identity.not_after,
        now=datetime.now(UTC),
        spare=_SPARE,
        remedy="a running agent renews it at the controller's enrolment port: see the check of that; once it has "
        "expired, a new token is needed (`nanofleet-agent enrol TOKEN --force`)",
    )


def _controller(settings: AgentSettings, identity: Identity | NanofleetError, folder: StateFolder) -> Finding:
    if not isinstance(identity, Identity):
        return skipped("controller", "not enrolled, so there is nothing to show it")
    address = identity.controller if settings.controller is None else parse_address(settings.controller)
    number = (folder.identity / "current").read_text(encoding="ascii").strip()
    files = tuple(folder.identity / number / name for name in ("certificate.pem", "key.pem", "trust.pem"))
    return peer_admits_us("controller", address, identity.tls, files=(files[0], files[1], files[2]))


def _enrolment_port(settings: AgentSettings, identity: Identity | NanofleetError) -> Finding:
    if settings.enrolment is not None:
        address: Address = parse_address(settings.enrolment)
    elif isinstance(identity, Identity):
        address = identity.enrolment
    else:
        return skipped("enrolment port", "its address comes with the token")
    return port_answers(
        "enrolment port",
        address,
        remedy="certificates are renewed there: start the controller, open its enrolment port (7444) in the firewall",
    )


def _broker(
    settings: AgentSettings, identity: Identity | NanofleetError, *, is_running: bool
) -> Finding | Sequence[Finding]:
    if isinstance(identity, Identity):
        tls = _broker_identity(settings) if settings.mqtt.tls.enabled else None
        return check_broker(settings.mqtt, identity.site, identity.agent_id, is_running=is_running, tls=tls)
    if not settings.mqtt.enabled:
        return skipped("broker", "switched off in the settings (mqtt.enabled)")
    where = Address(settings.mqtt.host, settings.mqtt.port)
    remedy = "start the broker (`systemctl start mosquitto`), or set mqtt.host and mqtt.port to where it listens"
    return (
        port_answers("broker", where, remedy=remedy),
        skipped("broker permissions", "not enrolled, so its topics are not known"),
    )


def _broker_identity(settings: AgentSettings) -> BrokerIdentity:
    own, wanted = IdentityFolder(StateFolder(settings.state_dir).identity).files(), settings.mqtt.tls
    context = client_context(certificate=own.certificate, key=own.key, trust=wanted.ca_file or own.trust)
    return BrokerIdentity(context, wanted.server_name or settings.mqtt.host)


def _local_port(bind: str | None, *, is_running: bool) -> Finding:
    if bind is None:
        return skipped("local port", "switched off in the settings (grpc_bind)")
    address = parse_address(bind)
    if address.port == 0:
        return skipped("local port", "the system chooses it at every start")
    if is_running:
        return port_answers("local port", address, remedy="see the agent's log")
    return port_is_free("local port", address, setting="grpc_bind")
