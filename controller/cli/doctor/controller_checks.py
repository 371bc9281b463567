"""What a controller needs of its machine. Everything is read from outside, so it works beside a running one too."""

import os
import resource
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import httpx

from controller.cli.doctor.catalogue import judge_catalogue
from controller.cli.doctor.certificates import shown_certificate
from controller.settings import Settings
from controller.storage.integrity import newest_metadata, quick_check
from core import folder_lock
from core.addresses import is_loopback, parse_address
from core.doctor import Check, Finding, ok, problem, skipped, warning
from core.machine_checks import (
    clock_is_set,
    disk_has_room,
    files_are_private,
    folder_works,
    memory_suffices,
    onnx_runtime_works,
    open_files_suffice,
    port_answers,
    port_is_free,
)

# As in `controller.api.open_files`: below it, strangers can use up what the fleet needs.
_NEED_FILES = 16_384
# Measured: the local Ray takes 0.8 GB, the controller 0.3 GB; one step of a publication may take what the settings say.
_RAY_BYTES, _OWN_BYTES = 800 << 20, 300 << 20
_HEAVY_TIMEOUT_S = 5.0
# What the tests run with; its settings are variables that other versions may not know.
TESTED_RAY = "2.60"
_PORTS = (("agents port", "grpc_bind"), ("enrolment port", "enrolment_bind"), ("operators port", "http_bind"))


def controller_checks(settings: Settings) -> dict[str, Check]:
    """Return every check, by name; where there is no data_dir, one that says so."""
    if not settings.data_dir.is_dir():
        reason = f"no data_dir at {settings.data_dir}: no controller here, or name its settings with --config"
        return {"data_dir": lambda: skipped("data_dir", reason)}
    is_running = folder_lock.is_held(settings.data_dir / "controller.lock")
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    ports: dict[str, Check] = {
        name: lambda n=name, s=setting: _port(n, s, settings, is_running=is_running)  # type: ignore[misc]  # defaults bind
        for name, setting in _PORTS
    }
    return {
        "data_dir": lambda: _data_dir(settings.data_dir, is_running=is_running),
        "clock": lambda: clock_is_set(datetime.now(UTC)),
        "folder": lambda: folder_works(settings.data_dir),
        "disk": lambda: disk_has_room(
            settings.data_dir,
            need_bytes=3 * settings.registry.max_model_bytes,
            what_for="three times registry.max_model_bytes: upload, variant, pack",
        ),
        "memory": lambda: memory_suffices(_need_bytes(settings, is_running=is_running)),
        "open files": lambda: open_files_suffice(hard_limit, need=_NEED_FILES),
        "key files": lambda: files_are_private(sorted(settings.keys_dir.rglob("*.pem"))),
        **_records(settings),
        "advertised host": lambda: _advertised(settings),
        **ports,
        "certificate": lambda: shown_certificate(settings, now=datetime.now(UTC), is_running=is_running),
        "Ray": lambda: _ray(settings),
        "heavy tier": lambda: _heavy(settings, is_running=is_running),
        "ONNX Runtime": lambda: onnx_runtime_works(os.environ),
    }


def _records(settings: Settings) -> dict[str, Check]:
    """Return what is found of the database and in it, where it is a file that may be read beside the controller."""
    if not settings.database_url.startswith("sqlite:"):
        reason = "the records are in PostgreSQL, whose own tools look after it"
        return {name: lambda n=name: skipped(n, reason) for name in ("database", "catalogue")}  # type: ignore[misc]
    database = settings.data_dir / "controller.sqlite"
    return {
        "database": lambda: _database(database),
        "catalogue": lambda: judge_catalogue(newest_metadata(database), now=datetime.now(UTC)),
    }


def _data_dir(folder: Path, *, is_running: bool) -> Finding:
    if folder.stat().st_mode & 0o077:
        remedy = f"`chmod 700 {folder}`; a controller does it itself when it starts"
        return warning("data_dir", f"others may look into {folder}", expected="mode 0700", remedy=remedy)
    if not is_running:
        return ok("data_dir", f"{folder}; no controller runs on it")
    holder = (folder / "controller.lock").read_text(encoding="ascii").strip()
    return ok("data_dir", f"{folder}; the controller on it is process {holder}")


def _need_bytes(settings: Settings, *, is_running: bool) -> int:
    step = settings.registry.publish_memory_bytes
    if is_running:
        return step
    return step + _OWN_BYTES + (_RAY_BYTES if settings.heavy.mode == "embedded" else 0)


def _database(path: Path) -> Finding:
    if not path.exists():
        remedy = "`nanofleet controller init` makes it; if there was one, restore the backup"
        return problem("database", f"{path} is not there", expected="the controller's database", remedy=remedy)
    if faults := quick_check(path):
        remedy = "stop the controller, keep a copy of the file, and restore the last backup (docs/operations.md)"
        return problem("database", f"{path}: {'; '.join(faults)[:300]}", expected="a whole database", remedy=remedy)
    return ok("database", f"{path} is whole")


def _port(check: str, setting: str, settings: Settings, *, is_running: bool) -> Finding:
    bind = parse_address(getattr(settings, setting))
    if bind.port == 0:
        return skipped(check, f"{setting} lets the system choose it at every start")
    if not is_running:
        return port_is_free(check, bind, setting=setting)
    # Every address is one of ours, and ours alone is asked.
    return port_answers(check, bind, remedy="see the controller's log; it says which port it could not open")


def _advertised(settings: Settings) -> Finding:
    """Say whether agents elsewhere can reach what tokens tell them."""
    check, host = "advertised host", settings.advertised_host
    binds = {setting: parse_address(getattr(settings, setting)) for _, setting in _PORTS[:2]}
    if host is None:
        here = all(is_loopback(bind.host) for bind in binds.values())
        return ok(check, "none; only agents of this machine" if here else "none; the addresses that are bound")
    local = [setting for setting, bind in binds.items() if is_loopback(bind.host)]
    if local and not is_loopback(host):
        return problem(
            check,
            f"tokens send agents to {host}, but {' and '.join(local)} listens on loopback only",
            expected="ports that other machines reach",
            remedy=f'set {local[0]} = "0.0.0.0:{binds[local[0]].port}", or remove advertised_host',
        )
    import socket

    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        remedy = "enter it in the DNS (or /etc/hosts of every agent), or advertise an address"
        return problem(check, f"{host}: {error.strerror or error}", expected="a name with an address", remedy=remedy)
    return ok(check, host)


def _ray(settings: Settings) -> Finding | Sequence[Finding]:
    if settings.heavy.mode == "url":
        return skipped("Ray", f"the heavy tier is elsewhere: {settings.heavy.address}")
    try:
        found = version("ray")
    except PackageNotFoundError:
        remedy = "`pip install 'nanofleet[heavy]'`, or let another machine run it: heavy.mode = \"url\""
        return problem("Ray", "it is not installed", expected=f"version {TESTED_RAY}", remedy=remedy)
    token = settings.data_dir / "heavy" / "ray-token"
    private = files_are_private([token], check="Ray token") if token.exists() else skipped("Ray token", "none yet")
    if not found.startswith(f"{TESTED_RAY}."):
        remedy = f"`pip install 'ray[serve]=={TESTED_RAY}.*'`, or try whether this one does"
        return warning("Ray", f"version {found}", expected=f"{TESTED_RAY}, which is tested", remedy=remedy), private
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0  # noqa: S108 (looked at, not used)
    return ok("Ray", f"version {found}, {shm >> 20:,} MiB of shared memory"), private


def _heavy(settings: Settings, *, is_running: bool) -> Finding:
    if settings.heavy.mode == "embedded" and not is_running:
        return skipped("heavy tier", "it starts with the controller")
    url = f"{settings.heavy.address}/v2/health/ready"
    try:
        answer = httpx.get(url, timeout=_HEAVY_TIMEOUT_S, trust_env=False)
    except httpx.HTTPError as error:
        remedy = f"see {settings.data_dir / 'heavy' / 'heavy.log'}; a cold start takes ten seconds"
        if settings.heavy.mode == "url":
            remedy = "start the server that heavy.url names, or correct heavy.url"
        return problem("heavy tier", f"{url}: {error}", expected="an answer", remedy=remedy)
    if not answer.is_success:
        remedy = "wait until its models are loaded, and see its log"
        return warning("heavy tier", f"{url}: {answer.status_code}", expected="200", remedy=remedy)
    return ok("heavy tier", f"{settings.heavy.address} is ready")
