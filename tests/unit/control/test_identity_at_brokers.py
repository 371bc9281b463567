"""What the authority certifies for the broker of a site: agents, devices and the broker itself."""

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from controller.identity.authority import CertificateAuthority, new_key, public_key_of
from controller.identity.common_names import agent_common_name, common_name_for
from controller.identity.keys import AuthorityKeys
from controller.identity.service import Identity
from core.errors import InvalidRequest
from core.ids import NAME_PATTERN, AgentId, SiteId
from core.spiffe import Peer, Role
from tests.support.fleet_values import NOON
from tests.support.identity_store import MemoryIdentityStore
from tests.support.trusted_controller import DOMAIN, ShiftedClock, made_csr

BERLIN = SiteId("berlin")
NAMES = st.from_regex(NAME_PATTERN, fullmatch=True)


@pytest.fixture
async def identity(tmp_path: Path) -> Identity:
    made = Identity(MemoryIdentityStore(), AuthorityKeys(tmp_path), clock=ShiftedClock(), trust_domain=DOMAIN)
    await made.prepare()
    return made


def common_names(certificate: x509.Certificate) -> list[str]:
    return [str(attribute.value) for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]


async def enrolled(identity: Identity, agent: str) -> x509.Certificate:
    token = await identity.create_token(BERLIN, created_by="ada", agent=AgentId(agent))
    credential = await identity.enrol(token.secret, made_csr(new_key()), agent)
    return x509.load_pem_x509_certificate(credential.certificate_chain)


async def test_an_agent_has_a_name_for_brokers(identity: Identity) -> None:
    assert common_names(await enrolled(identity, "gate-1")) == ["agent:gate-1"]


async def test_an_agent_whose_name_has_no_room_there_enrols_without_one(identity: Identity) -> None:
    assert common_names(await enrolled(identity, "g" * 64)) == []


async def test_a_devices_certificate_names_it_and_its_site(identity: Identity) -> None:
    certificate = identity.certify(Role.DEVICE, "cam-1", made_csr(new_key()), site=BERLIN)

    assert common_names(x509.load_pem_x509_certificate(certificate.pem)) == ["cam-1@berlin"]


@pytest.mark.parametrize("role", [Role.APPLICATION, Role.HEAVY])
async def test_whoever_has_no_business_at_a_broker_has_no_name_there(identity: Identity, role: Role) -> None:
    certificate = identity.certify(role, "shop", made_csr(new_key()))

    assert common_names(x509.load_pem_x509_certificate(certificate.pem)) == []


async def test_a_broker_may_show_the_names_of_its_machine_and_be_no_client(identity: Identity) -> None:
    hosts = ("Broker.example", "10.0.0.7", "fd00::1")
    certificate = identity.certify(Role.BROKER, "berlin", made_csr(new_key()), hosts=hosts)
    read = x509.load_pem_x509_certificate(certificate.pem)

    names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == [
        f"spiffe://{DOMAIN}/broker/berlin",
        "broker.example",
        "10.0.0.7",
        "fd00::1",
    ]
    usage = read.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


@pytest.mark.parametrize(
    "host",
    [
        "controller.nanofleet.internal",
        "Controller.NANOFLEET.internal",
        "x.controller.nanofleet.internal",
        "nanofleet.internal",
        "controller.nanofleet.internal.",
        "*.nanofleet.internal",
        "*.example",
        "*",
        "broker.example:8883",
        "a b",
        "127.1",
        "-a",
        "a..b",
        "a\0b",
        "ä.example",
        "a" * 64,
        "",
    ],
)
def test_no_broker_is_certified_for_the_controllers_name_or_for_many_machines(host: str) -> None:
    authority = CertificateAuthority.make(trust_domain=DOMAIN, now=NOON)
    key = public_key_of(new_key().public_key())

    with pytest.raises(InvalidRequest, match="host"):
        authority.issue(Peer(DOMAIN, Role.BROKER, "b"), key, now=NOON, hosts=[host])


@pytest.mark.parametrize(
    ("role", "site", "hosts"),
    [
        (Role.DEVICE, None, ()),
        (Role.DEVICE, BERLIN, ("broker.example",)),
        (Role.APPLICATION, BERLIN, ()),
        (Role.APPLICATION, None, ("broker.example",)),
        (Role.BROKER, None, ()),
        (Role.BROKER, BERLIN, ("broker.example",)),
        (Role.BROKER, None, ("broker.example",) * 17),
        (Role.AGENT, None, ()),
        (Role.CONTROLLER, None, ()),
    ],
)
def test_a_role_is_given_away_with_what_belongs_to_it_only(
    role: Role, site: SiteId | None, hosts: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidRequest, match=r"role|site|hosts"):
        common_name_for(role, "x", site=site, hosts=hosts)


def test_a_device_whose_name_has_no_room_is_told_so() -> None:
    with pytest.raises(InvalidRequest, match="at most 63 characters of name and site together, got 66"):
        common_name_for(Role.DEVICE, "c" * 60, site=BERLIN, hosts=())


@given(NAMES, NAMES, NAMES)
def test_no_device_is_called_like_an_agent_or_like_a_device_of_another_site(name: str, site: str, other: str) -> None:
    if len(name) + max(len(site), len(other)) > 63:
        return
    device = common_name_for(Role.DEVICE, name, site=SiteId(site), hosts=())

    assert device != agent_common_name(AgentId(name))
    assert (device == common_name_for(Role.DEVICE, name, site=SiteId(other), hosts=())) == (site == other)
    assert not set(device) & set("+#/%$")


@given(st.text(max_size=40))
def test_a_site_that_is_no_name_makes_no_certificate(site: str) -> None:
    if NAME_PATTERN.fullmatch(site):
        return
    with pytest.raises(InvalidRequest):
        common_name_for(Role.DEVICE, "cam-1", site=SiteId(site), hosts=())
