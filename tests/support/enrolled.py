"""What outlives every controller of a fleet, its authority and its catalogue; and agents that have enrolled there."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from core.addresses import Address
from core.catalogue import family_role
from core.grpc_transport import TlsIdentity
from core.ids import AgentId, ModelName, SiteId
from edge_agent.health.state_folder import StateFolder
from edge_agent.identity.folder import Identity, IdentityFolder
from tests.support.catalogue_side import CatalogueSide
from tests.support.enrolment import DOMAIN, ROOT, WEEK, FakeAuthority, pem_of_key
from tests.support.variants import MadeVariant


class Realm:
    """The keys of one fleet, and what was released with them."""

    def __init__(self) -> None:
        self.authority = FakeAuthority()
        self.side = CatalogueSide()

    def release(self, *variants: MadeVariant) -> None:
        """List the variants in the catalogue."""
        for variant in variants:
            model = ModelName(variant.manifest.model)
            if family_role(model) not in self.side.families:
                self.side.add_family(model)
            self.side.release(variant)
        self.side.publish()

    def enrol(self, state_dir: Path, *, controller: Address, agent_id: str = "gate-1") -> Identity:
        """Leave in `state_dir` what enrolment does, and return the identity in it."""
        anchor = self.side.anchor
        identity = enrolled(state_dir, controller=controller, agent_id=agent_id, authority=self.authority, root=anchor)
        trust = StateFolder(state_dir).trust
        trust.mkdir(exist_ok=True)
        (trust / "root.json").write_bytes(anchor)
        return identity


def enrolled(
    state_dir: Path,
    *,
    controller: Address,
    agent_id: str,
    site: str = "berlin",
    authority: FakeAuthority | None = None,
    root: bytes = ROOT,
) -> Identity:
    """Put an identity, certified by `authority` or by one that nobody knows, into an agent's state folder."""
    authority, begins = authority or FakeAuthority(), datetime.now(UTC).replace(microsecond=0)
    key = ec.generate_private_key(ec.SECP256R1())
    chain = authority.certified(key.public_key(), agent_id, begins=begins)
    identity = Identity(
        AgentId(agent_id),
        SiteId(site),
        DOMAIN,
        controller,
        # Nobody enrols or renews here.
        controller,
        hashlib.sha256(root).hexdigest(),
        begins,
        begins + WEEK,
        TlsIdentity(chain, pem_of_key(key), authority.pem),
    )
    folder = IdentityFolder(StateFolder(state_dir).identity)
    folder.replace(identity)
    folder.confirm()
    return identity
