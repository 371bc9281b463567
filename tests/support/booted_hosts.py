"""Hosts made on the spot: Debian with systemd as its first process, files, processes and a network of its own, sshd.

    with booted_hosts(tmp_path, ["fleet", "gate-1"]) as hosts:
        hosts["fleet"].address               # reached from `hosts.control`, a network namespace, and nowhere else
        hosts["gate-1"].run("systemctl", "is-active", "nanofleet-agent")

One root is made with mmdebstrap from the sources that this machine's apt has, and kept in build/; each host gets an
overlay over it. `systemd-nspawn` boots them. No address is given to anything outside the namespaces made here, and
afterwards all of it is gone. Needs root.
"""

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.mosquitto import MissingProgram, program_path

ROOT = Path(__file__).parents[2]
ROOTS = ROOT / "build/hosts"
PROGRAMS = ("ip", "mmdebstrap", "mount", "ssh", "ssh-keygen", "systemd-nspawn")
RELEASE = "bookworm"
# What a host has before anybody set it up; python3-venv and mosquitto only so that no host needs a mirror.
PACKAGES = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "openssh-server",
    "python3",
    "python3-apt",
    "python3-venv",
    "sudo",
    "mosquitto",
)
# Of a network that is documented to be nobody's (RFC 5737).
NETWORK = "198.51.100"
MAKE_TIMEOUT_S = 900.0
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
COMMAND_TIMEOUT_S = 60.0

# A group of its own in each hierarchy that systemd manages, or the hosts would end each other's services.
_IN_GROUPS = 'for group in $GROUPS_OF_HOST; do echo $$ > "$group/cgroup.procs" || exit 1; done; exec "$@"'


@dataclass(frozen=True, slots=True)
class Host:
    """`files` is its root as seen from here."""

    name: str
    address: str
    files: Path
    ssh: tuple[str, ...]

    def run(self, *words: str) -> str:
        """Return what a command says that must succeed there."""
        done = subprocess.run([*self.ssh, *words], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
        assert done.returncode == 0, f"{self.name}: {words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()


@dataclass(frozen=True, slots=True)
class Hosts:
    """`control` is the command that runs another one where the hosts can be reached."""

    control: tuple[str, ...]
    key: Path
    known_hosts: Path
    by_name: dict[str, Host]

    def __getitem__(self, name: str) -> Host:
        return self.by_name[name]


def require_hosts() -> None:
    """Raise MissingProgram unless this process may boot hosts."""
    for program in PROGRAMS:
        program_path(program)
    if os.geteuid() != 0:
        raise MissingProgram("booting hosts in namespaces needs root")


@contextmanager
def booted_hosts(folder: Path, names: Sequence[str]) -> Iterator[Hosts]:
    """Boot hosts and wait until each lets root in with `key`.

    Raises:
        MissingProgram: this process may not boot hosts.
    """
    require_hosts()
    base, prefix = _root(), f"nf{os.getpid()}"
    key, known = folder / "id", folder / "known_hosts"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    with ExitStack() as stack:
        control = stack.enter_context(_namespace(f"{prefix}-control"))
        _ip("-n", control, "link", "add", "bridge", "type", "bridge")
        _ip("-n", control, "address", "add", f"{NETWORK}.1/24", "dev", "bridge")
        _ip("-n", control, "link", "set", "bridge", "up")
        within = ("ip", "netns", "exec", control)
        hosts = {}
        for number, name in enumerate(names):
            address = f"{NETWORK}.{10 + number}"
            namespace = stack.enter_context(_namespace(f"{prefix}-{name}"))
            _connect(control, namespace, port=f"port{number}", address=address)
            files = stack.enter_context(_overlay(base, folder / name))
            _settle(files, name, key=key.with_suffix(".pub"), known=known, address=address)
            stack.enter_context(_running(files, machine=f"{prefix}-{name}", log=folder / f"{name}.log"))
            ssh = (*within, "ssh", "-i", str(key), "-o", f"UserKnownHostsFile={known}", "-o", "BatchMode=yes")
            hosts[name] = Host(name, address, files, (*ssh, f"root@{address}"))
        for host in hosts.values():
            _await_ssh(host)
        yield Hosts(within, key, known, hosts)


def _root() -> Path:
    """Return the root that hosts share, made anew when what it consists of changed."""
    recipe = hashlib.sha256(repr((RELEASE, PACKAGES)).encode()).hexdigest()[:16]
    root = ROOTS / f"{RELEASE}-{recipe}"
    if not root.exists():
        partial = root.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        ROOTS.mkdir(parents=True, exist_ok=True)
        command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}", RELEASE]
        subprocess.run([*command, str(partial), *_apt_sources()], check=True, timeout=MAKE_TIMEOUT_S)
        partial.rename(root)
    return root


def _apt_sources() -> list[str]:
    """Return where this machine's apt gets its packages."""
    found = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("debian.*"))]
    return [str(path) for path in found if path.exists() and path.stat().st_size]


@contextmanager
def _namespace(name: str) -> Iterator[str]:
    _ip("netns", "add", name)
    try:
        _ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        _ip("netns", "delete", name)


def _connect(control: str, namespace: str, *, port: str, address: str) -> None:
    _ip("-n", control, "link", "add", port, "type", "veth", "peer", "name", "host0", "netns", namespace)
    _ip("-n", control, "link", "set", port, "master", "bridge", "up")
    _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "host0")
    _ip("-n", namespace, "link", "set", "host0", "up")


@contextmanager
def _overlay(base: Path, folder: Path) -> Iterator[Path]:
    upper, work, root = (folder / name for name in ("upper", "work", "root"))
    for each in (upper, work, root):
        each.mkdir(parents=True)
    options = f"lowerdir={base},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, root], check=True)
    try:
        yield root
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)


def _settle(files: Path, name: str, *, key: Path, known: Path, address: str) -> None:
    """Give a host its name and us its door."""
    (files / "etc/hostname").write_text(f"{name}\n")
    keys = files / "root/.ssh/authorized_keys"
    keys.parent.mkdir(mode=0o700, exist_ok=True)
    keys.write_text(key.read_text())
    host_key = (files / "etc/ssh/ssh_host_ed25519_key.pub").read_text()
    with known.open("a") as file:
        file.write(f"{address} {host_key}")


@contextmanager
def _running(files: Path, *, machine: str, log: Path) -> Iterator[None]:
    command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--resolv-conf=off", "--link-journal=no"]
    command += [f"--machine={machine}", f"--directory={files}", f"--network-namespace-path=/run/netns/{machine}"]
    with _groups(machine) as groups, log.open("wb") as output:
        process = subprocess.Popen(
            ["sh", "-c", _IN_GROUPS, "sh", *command, "--console=pipe", "--boot"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "GROUPS_OF_HOST": " ".join(map(str, groups))},
        )
        try:
            yield
        finally:
            # It asks the host to power off.
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_TIMEOUT_S)


@contextmanager
def _groups(name: str) -> Iterator[list[Path]]:
    """Make a control group in every hierarchy that a systemd uses to keep track of processes."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    tracked = [
        Path(fields[1])
        for fields in mounts
        if fields[2] == "cgroup2" or (fields[2] == "cgroup" and "name=systemd" in fields[3].split(","))
    ]
    groups = [hierarchy / name for hierarchy in tracked]
    for group in groups:
        group.mkdir()
    try:
        yield groups
    finally:
        for group in groups:
            _remove_group(group)


def _remove_group(group: Path) -> None:
    for folder, _, _ in os.walk(group, topdown=False):
        Path(folder).rmdir()


def _await_ssh(host: Host) -> None:
    give_up_s = time.monotonic() + START_TIMEOUT_S
    while True:
        done = subprocess.run([*host.ssh, "true"], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
        if done.returncode == 0:
            return
        assert time.monotonic() < give_up_s, f"{host.name} lets nobody in: {done.stderr}"
        time.sleep(0.2)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=COMMAND_TIMEOUT_S)
