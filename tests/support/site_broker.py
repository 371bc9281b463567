"""A site with a broker that runs the very files of deploy/mosquitto, and peers that a real authority has certified.

site = Site(folder, identity)
with site.running(agents=["gate-1"]) as broker:
    context = site.device("cam-1")
"""

import getpass
import signal
import ssl
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from controller.demo.ports import free_port
from controller.identity.authority import CertificateAuthority, key_pem, new_key, public_key_of
from controller.identity.keys import AuthorityKeys
from controller.identity.service import Identity
from core.addresses import Address
from core.grpc_transport import TlsIdentity
from core.ids import AgentId, SiteId
from core.spiffe import Peer, Role
from core.tls_files import folder_context, write_tls_identity
from edge_agent.front.mqtt.tls import BrokerTls
from edge_agent.identity.folder import Identity as AgentIdentity
from edge_agent.identity.folder import IdentityFolder
from tests.support.identity_store import MemoryIdentityStore
from tests.support.mosquitto import HOST, Mosquitto
from tests.support.trusted_controller import DOMAIN, ShiftedClock, made_csr

TEMPLATES = Path(__file__).parents[2] / "deploy" / "mosquitto"
SITE = SiteId("berlin")
# Nobody enrols, renews or reports here.
_NOBODY = Address(HOST, 9)


class SiteBroker(Mosquitto):
    """Mosquitto on what `render` makes of our files, on a loopback port and as the user of the tests."""

    def __init__(self, folder: Path, *, site: str, agents: Sequence[str], banned: Sequence[str] = ()) -> None:
        self._site, self._agents, self._banned = site, agents, banned
        super().__init__(folder)

    def ban(self, device: str) -> None:
        """Have the broker read an access list that shuts a device out; it takes effect a moment later."""
        assert self._process is not None
        self._banned = [*self._banned, device]
        self._config_text(persistent=False, nodelay=True)
        self._process.send_signal(signal.SIGHUP)

    def add_plain_listener(self) -> int:
        """Do from the next start on what the comment in nanofleet.conf says; return the port."""
        port = free_port()
        text = self._config.read_text()
        acl = f"acl_file {self._folder}/nanofleet.acl"
        text = text.replace("# listener 1883 127.0.0.1", f"listener {port} {HOST}").replace(
            "# allow_anonymous true", "allow_anonymous true"
        )
        text = text.replace(f"\nallow_anonymous false\n{acl}\n", "\n")
        listener = f"listener {self.port} {HOST}\n"
        text = text.replace(listener, f"{listener}allow_anonymous false\n{acl}\n")
        self._config.write_text("per_listener_settings true\n" + text)
        return port

    def _config_text(self, *, persistent: bool, nodelay: bool) -> str:
        assert nodelay
        assert not persistent
        render(
            self._folder,
            *("--site", self._site, "--listen", f"{self.port} {HOST}", "--user", getpass.getuser()),
            *("--folder", str(self._folder)),
            *(word for agent in self._agents for word in ("--agent", agent)),
            *(word for device in self._banned for word in ("--ban", device)),
        )
        return (self._folder / "nanofleet.conf").read_text()


def render(to: Path, *words: str) -> None:
    subprocess.run([str(TEMPLATES / "render"), "--to", str(to), *words], check=True, timeout=30)


class Site:
    """`trust` are the authorities that the broker and its peers believe now."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        self._folder = folder
        self._identity = identity
        self._disk = ThreadPoolExecutor(1)

    @classmethod
    async def made(cls, folder: Path) -> "Site":
        """Make a fleet with an authority of its own."""
        keys = AuthorityKeys(folder / "keys")
        identity = Identity(MemoryIdentityStore(), keys, clock=ShiftedClock(), trust_domain=DOMAIN)
        await identity.prepare()
        return cls(folder, identity)

    def close(self) -> None:
        self._disk.shutdown()

    @contextmanager
    def running(self, *, agents: Sequence[str] = ("gate-1",), banned: Sequence[str] = ()) -> Iterator[SiteBroker]:
        folder = self._folder / "broker"
        self.certify_broker()
        broker = SiteBroker(folder, site=SITE, agents=agents, banned=banned)
        broker.start()
        try:
            yield broker
        finally:
            broker.kill()

    def certify_broker(self) -> None:
        """Give the broker a certificate and the authorities to believe; they count when it starts."""
        self._certified(Role.BROKER, "berlin", self._folder / "broker", hosts=[HOST, "localhost"])

    def device(self, name: str, *, site: str = SITE) -> ssl.SSLContext:
        return folder_context(self.device_folder(name, site=site))

    def device_folder(self, name: str, *, site: str = SITE) -> Path:
        return self._certified(Role.DEVICE, name, self._folder / f"{name}@{site}", site=SiteId(site))

    def application(self, name: str) -> ssl.SSLContext:
        return folder_context(self._certified(Role.APPLICATION, name, self._folder / name))

    def broker_as_client(self) -> ssl.SSLContext:
        return folder_context(self._folder / "broker")

    def nobody(self) -> ssl.SSLContext:
        """Return what has no certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self._identity.trust_bundle().decode())
        return context

    def forged(self, common_name: str, *, life: timedelta = timedelta(days=1)) -> ssl.SSLContext:
        """Return a device certificate that the fleet's authority would never issue: with any name, for any time."""
        sha256 = self._identity.authorities()[-1].sha256
        certificate = self._identity.authorities()[-1].certificate.encode()
        signer = CertificateAuthority.load(certificate, AuthorityKeys(self._folder / "keys").load(sha256))
        return self._signed_by(signer, common_name, now=datetime.now(UTC) + life - timedelta(days=90))

    def of_another_fleet(self, common_name: str) -> ssl.SSLContext:
        now = datetime.now(UTC)
        return self._signed_by(CertificateAuthority.make(trust_domain=DOMAIN, now=now), common_name, now=now)

    async def agent(self, name: str, *, server_name: str = HOST, ca_file: Path | None = None) -> BrokerTls:
        """Enrol an agent; return what it shows to the broker, and whom it believes."""
        return BrokerTls(await self.agent_folder(name), server_name, ca_file=ca_file, disk=self._disk)

    async def agent_folder(self, name: str, *, path: Path | None = None) -> IdentityFolder:
        """Enrol an agent into a folder, or once more into the one that it has."""
        folder, key = IdentityFolder(path or self._folder / name), new_key()
        token = await self._identity.create_token(SITE, created_by="ada", agent=AgentId(name))
        credential = await self._identity.enrol(token.secret, made_csr(key), name)
        now = datetime.now(UTC)
        tls = TlsIdentity(credential.certificate_chain, key_pem(key), credential.trust_bundle)
        folder.replace(
            AgentIdentity(
                AgentId(name), SITE, DOMAIN, _NOBODY, _NOBODY, "0" * 64, now, credential.identity.not_after, tls
            )
        )
        return folder

    async def replace_authority(self) -> None:
        """Rotate to a new authority and forget the one before."""
        await self._identity.rotate()
        await self._identity.rotate()
        await self._identity.drop_authority(self._identity.authorities()[0].sha256)

    def _certified(
        self, role: Role, name: str, folder: Path, *, site: SiteId | None = None, hosts: Sequence[str] = ()
    ) -> Path:
        key = new_key()
        certificate = self._identity.certify(role, name, made_csr(key), site=site, hosts=hosts)
        write_tls_identity(folder, TlsIdentity(certificate.pem, key_pem(key), self._identity.trust_bundle()))
        return folder

    def _signed_by(self, signer: CertificateAuthority, common_name: str, *, now: datetime) -> ssl.SSLContext:
        key, peer = new_key(), Peer(DOMAIN, Role.DEVICE, "forged")
        made = signer.issue(peer, public_key_of(key.public_key()), now=now, common_name=common_name)
        folder = self._folder / f"forged-{made.serial}"
        write_tls_identity(folder, TlsIdentity(made.pem, key_pem(key), self._identity.trust_bundle()))
        return folder_context(folder)
