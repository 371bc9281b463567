"""Checks on the machine that both sides need: clock, disk, memory, files, ports, certificates, ONNX Runtime.

Where a check reads `/proc` or `/sys`, the folder is an argument.
"""

import os
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import Path

from core.addresses import Address
from core.atomic_files import write_atomically
from core.doctor import Finding, ok, problem, skipped, warning
from core.grpc_transport import TlsIdentity
from core.spiffe import CONTROLLER_DNS_NAME

# No release of nanofleet is older: a clock before it has not been set since the machine started.
_BEGINNING_YEAR = 2026
# Chosen: far beyond what a synchronised clock shows, well below what certificates and deadlines endure.
_SKEW_WARNING, _SKEW_PROBLEM = timedelta(seconds=5), timedelta(seconds=60)
_SET_CLOCK = "set the clock: `timedatectl set-ntp true`, or install chrony; a board without a battery needs it at boot"
# Where locks or renames are not what a database needs, and where nothing survives a restart.
_NETWORK_TYPES, _FLEETING_TYPES = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p"}), frozenset({"tmpfs", "ramfs"})
_CONNECT_TIMEOUT_S = 5.0
_ORT_TIMEOUT_S = 15.0
_MIB = 1 << 20


def clock_is_set(now: datetime) -> Finding:
    if now.year < _BEGINNING_YEAR:
        return problem("clock", f"it says {now:%Y-%m-%d %H:%M} UTC", expected="the present", remedy=_SET_CLOCK)
    return ok("clock", f"it says {now:%Y-%m-%d %H:%M:%S} UTC")


def clocks_agree(now: datetime, theirs: datetime, *, whose: str) -> Finding:
    """Compare with a clock that is known to the second."""
    skew = abs(now - theirs)
    if skew < _SKEW_WARNING:
        return ok("clock skew", f"within {max(1.0, skew.total_seconds()):.0f} s of {whose}")
    judged = problem if skew >= _SKEW_PROBLEM else warning
    side = "ahead of" if now > theirs else "behind"
    return judged(
        "clock skew",
        f"{skew.total_seconds():.0f} s {side} {whose}",
        expected=f"less than {_SKEW_WARNING.total_seconds():.0f} s",
        remedy=_SET_CLOCK,
    )


def folder_works(path: Path, *, mounts: Path = Path("/proc/self/mounts")) -> Finding:
    """Write, make durable and read back a file in `path`, and look at what kind of file system it is on."""
    if not path.is_dir():
        return skipped("folder", f"{path} is not there yet; it is made at the first start")
    probe = path / ".doctor"
    try:
        write_atomically(probe, b"written and made durable", mode=0o600)
        is_whole = probe.read_bytes() == b"written and made durable"
        probe.unlink()
    except OSError as error:
        return problem(
            "folder",
            f"{path}: {error.strerror}",
            expected="a folder that this user can write to",
            remedy=f"`chown` it to the user that runs here (now: uid {os.getuid()}), or mount it writable",
        )
    kind = _file_system(path.resolve(), mounts)
    if not is_whole:
        return problem(
            "folder", f"{path}: reads back another content", expected="what was written", remedy="check disk"
        )
    if kind in _NETWORK_TYPES:
        return warning(
            "folder",
            f"{path} is on {kind}",
            expected="a local file system: locks and fsync over a network are not to be relied on",
            remedy="move it to a local disk and back it up to the network",
        )
    if kind in _FLEETING_TYPES:
        return warning(
            "folder",
            f"{path} is on {kind}",
            expected="a disk: after a restart of the machine all of it is gone",
            remedy="move it to a disk",
        )
    return ok("folder", f"{path} can be written, fsync works, file system {kind}")


def disk_has_room(path: Path, *, need_bytes: int, what_for: str) -> Finding:
    there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    figures = os.statvfs(there)
    free_bytes = figures.f_bavail * figures.f_frsize
    found = f"{free_bytes / _MIB:,.0f} MiB free at {there}"
    if figures.f_files and figures.f_favail == 0:
        return problem("disk", f"no inode is free at {there}", expected="some", remedy="remove small files there")
    if free_bytes < need_bytes:
        return problem(
            "disk",
            found,
            expected=f"at least {need_bytes / _MIB:,.0f} MiB ({what_for})",
            remedy="free some space, or move the folder to a larger disk",
        )
    return ok("disk", found)


def files_are_private(files: Iterable[Path], *, check: str = "key files") -> Finding:
    """Say whether nobody but the owner can read the files."""
    found = [(path, path.stat()) for path in files]
    open_ones = [path for path, status in found if status.st_mode & 0o077]
    foreign = [path for path, status in found if status.st_uid not in {os.getuid(), 0} and os.getuid() != 0]
    if open_ones:
        mode = stat.S_IMODE(open_ones[0].stat().st_mode)
        return problem(
            check,
            f"{open_ones[0]} has mode {mode:04o}" + _others(open_ones),
            expected="mode 0600",
            remedy=f"`chmod 600 {open_ones[0]}`; replace the key if somebody else may have read it",
        )
    if foreign:
        return problem(
            check,
            f"{foreign[0]} belongs to uid {foreign[0].stat().st_uid}" + _others(foreign),
            expected=f"uid {os.getuid()}",
            remedy="run the doctor as the user of the service, or `chown` the files to it",
        )
    return ok(check, f"{len(found)} files, readable by their owner only")


def memory_suffices(need_bytes: int, *, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Finding:
    """Compare what the kernel says is available, and what the control group leaves, with `need_bytes`."""
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    left = _left_in_group(proc, cgroups)
    found = f"{available / _MIB:,.0f} MiB available"
    if left is not None and left < available:
        available = left
        found = f"{left / _MIB:,.0f} MiB left by the control group's limit"
    if available < need_bytes:
        return warning(
            "memory",
            found,
            expected=f"{need_bytes / _MIB:,.0f} MiB",
            remedy="stop other programs, raise the limit of the service (MemoryMax), or lower the settings",
        )
    return ok("memory", found)


def open_files_suffice(hard: int, *, need: int) -> Finding:
    """Judge the hard limit of open files; the soft one is raised at start."""
    if 0 <= hard < need:
        return warning(
            "open files",
            f"at most {hard}",
            expected=f"{need}: every connection is one",
            remedy="raise the hard limit: LimitNOFILE= in the unit, or `ulimit -Hn`",
        )
    return ok("open files", "no limit" if hard < 0 else f"up to {hard}")


def port_is_free(check: str, bind: Address, *, setting: str) -> Finding:
    """Say whether we could listen there; nobody of ours does at the moment."""
    family = socket.AF_INET6 if ":" in bind.host else socket.AF_INET
    try:
        socket.create_server((bind.host, bind.port), family=family).close()
    except OSError as error:
        return problem(
            check,
            f"cannot listen on {bind}: {error.strerror}",
            expected="a free port of this machine",
            remedy=f"see who listens with `ss -ltnp`, stop it, or set {setting} to another port",
        )
    return ok(check, f"{bind} is free")


def port_answers(check: str, address: Address, *, remedy: str) -> Finding:
    try:
        socket.create_connection((address.host, address.port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return problem(
            check,
            f"{address}: {error.strerror or error}",
            expected="something that takes connections",
            remedy=remedy,
        )
    return ok(check, f"{address} takes connections")


def certificate_lasts(
    check: str, not_before: datetime, not_after: datetime, *, now: datetime, spare: timedelta, remedy: str
) -> Finding:
    """Judge a certificate by its dates; with less than `spare` left it should have been renewed already."""
    if now < not_before:
        return problem(
            check,
            f"it begins on {not_before:%Y-%m-%d %H:%M} UTC, and this clock says {now:%Y-%m-%d %H:%M}",
            expected="a clock after its beginning",
            remedy=_SET_CLOCK,
        )
    if now >= not_after:
        return problem(check, f"expired on {not_after:%Y-%m-%d %H:%M} UTC", expected="a valid one", remedy=remedy)
    left = not_after - now
    found = f"good until {not_after:%Y-%m-%d %H:%M} UTC"
    if left < spare:
        hours = spare.total_seconds() / 3600
        return warning(check, found, expected=f"more than {hours:.0f} h left", remedy=remedy)
    return ok(check, found)


def peer_admits_us(check: str, address: Address, identity: TlsIdentity, *, files: tuple[Path, Path, Path]) -> Finding:
    """Shake hands over mutual TLS and wait for the first byte: only then has the peer looked at our certificate.

    Args:
        files: certificate chain, key and trust bundle of `identity`, which the library reads from files.
    """
    chain, key, _ = files
    try:
        context = ssl.create_default_context(cadata=identity.trust_bundle.decode("ascii"))
        context.load_cert_chain(chain, key)
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((address.host, address.port), timeout=_CONNECT_TIMEOUT_S) as connection,
            context.wrap_socket(connection, server_hostname=CONTROLLER_DNS_NAME) as secured,
        ):
            is_admitted = bool(secured.recv(1))
    except ssl.SSLCertVerificationError as error:
        return problem(
            check,
            f"{address} does not prove to be our controller: {error.verify_message}",
            expected="a certificate of an authority in our trust bundle",
            remedy="check the address and both clocks; if the fleet has another authority now, enrol again (--force)",
        )
    except ssl.SSLError as error:
        return problem(
            check,
            f"{address} refuses our certificate: {error.reason or error}",
            expected="to be let in",
            remedy="see `nanofleet devices identity` and `nanofleet authority status`; enrol again (--force) if it is "
            "banned, expired or of a dropped authority",
        )
    except OSError as error:
        return problem(
            check,
            f"{address}: {error.strerror or error}",
            expected="the controller's port",
            remedy="start the controller, open the port in the firewall, or set `controller` to where it is now",
        )
    if not is_admitted:
        return problem(check, f"{address} hangs up", expected="to be let in", remedy="see the controller's log")
    return ok(check, f"{address} proves who it is and lets us in")


def onnx_runtime_works(environment: Mapping[str, str], *, python: str = sys.executable) -> Finding:
    """Import ONNX Runtime in a child, the interpreter `python`, so that this process stays light."""
    wanted = environment.get("ORT_DISABLE_TELEMETRY", "1")
    program = "import onnxruntime as o; print(o.__version__, ','.join(o.get_available_providers()))"
    done = subprocess.run(
        [python, "-I", "-c", program],
        check=False,
        env={**environment, "ORT_DISABLE_TELEMETRY": wanted},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_ORT_TIMEOUT_S,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return problem(
            "ONNX Runtime",
            last[:300],
            expected="to be importable",
            remedy="install it for this machine: `pip install onnxruntime`; the wheel needs glibc 2.28 and AVX on x86",
        )
    if wanted != "1":
        return warning(
            "ONNX Runtime",
            f"ORT_DISABLE_TELEMETRY is {wanted!r}",
            expected="1: from version 1.29 on it sends telemetry by default",
            remedy="unset ORT_DISABLE_TELEMETRY; nanofleet sets it to 1",
        )
    return ok("ONNX Runtime", f"version {done.stdout.strip()}, telemetry off")


def _others(paths: list[Path]) -> str:
    return f", and {len(paths) - 1} more" if len(paths) > 1 else ""


def _file_system(path: Path, mounts: Path) -> str:
    """Return the type of the file system that `path` is on."""
    found = ("", "unknown")
    for line in mounts.read_text().splitlines():
        _, at, kind, *_ = line.split()
        # What is mounted over something else stands later.
        if path.is_relative_to(at) and len(at) >= len(found[0]):
            found = (at, kind)
    return found[1]


def _left_in_group(proc: Path, cgroups: Path) -> int | None:
    """Return what the limits of the control group (version 2) and those above leave, in bytes; None: there are none."""
    name = next((line[4:] for line in (proc / "self/cgroup").read_text().splitlines() if line.startswith("0::/")), None)
    if name is None:
        return None
    left: int | None = None
    folder = cgroups / name
    for group in (folder, *folder.parents):
        if not group.is_relative_to(cgroups):
            break
        try:
            limit = (group / "memory.max").read_text().strip()
            used = int((group / "memory.current").read_text())
        except OSError:
            continue
        if limit != "max":
            left = min(int(limit) - used, left) if left is not None else int(limit) - used
    return left
