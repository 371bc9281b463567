"""What the authority certifies, and which requests it takes."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.identity.authority import CertificateAuthority, checked_csr, is_signed_by, new_key, public_key_of
from controller.identity.keys import AuthorityKeys
from controller.identity.model import LIFETIMES
from core.errors import InvalidRequest, Unavailable
from core.spiffe import CONTROLLER_DNS_NAME, Peer, Role
from tests.support.fleet_values import NOON
from tests.support.trusted_controller import made_csr

DOMAIN = "fleet.test"


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    return CertificateAuthority.make(trust_domain=DOMAIN, now=NOON)


def issued(authority: CertificateAuthority, role: Role) -> x509.Certificate:
    key = public_key_of(new_key().public_key())
    return x509.load_pem_x509_certificate(authority.issue(Peer(DOMAIN, role, "name"), key, now=NOON).pem)


def names_of(certificate: x509.Certificate) -> list[str]:
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert extension.critical
    return [str(name.value) for name in extension.value]


@pytest.mark.parametrize("role", [Role.HEAVY, Role.APPLICATION, Role.DEVICE])
def test_a_client_certificate_names_one_role_and_is_good_for_nothing_else(
    authority: CertificateAuthority, role: Role
) -> None:
    certificate = issued(authority, role)

    assert names_of(certificate) == [f"spiffe://{DOMAIN}/{role}/name"]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert certificate.not_valid_after_utc == (NOON + LIFETIMES[role]).replace(microsecond=0)


def test_an_agents_certificate_serves_its_own_faces_too_under_a_name_of_its_own(
    authority: CertificateAuthority,
) -> None:
    certificate = issued(authority, Role.AGENT)

    assert names_of(certificate) == [f"spiffe://{DOMAIN}/agent/name", "name.agents.nanofleet.internal"]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]


@pytest.mark.parametrize("agent_id", ["Gate-1", "gate.1", "gate_1", "-gate", "g" * 64])
def test_an_agent_whose_id_is_no_dns_label_has_no_dns_name(authority: CertificateAuthority, agent_id: str) -> None:
    key = public_key_of(new_key().public_key())
    certificate = authority.issue(Peer(DOMAIN, Role.AGENT, agent_id), key, now=NOON)

    assert names_of(x509.load_pem_x509_certificate(certificate.pem)) == [f"spiffe://{DOMAIN}/agent/{agent_id}"]


def test_only_a_controller_is_certified_for_its_dns_name(authority: CertificateAuthority) -> None:
    certificate = issued(authority, Role.CONTROLLER)

    assert names_of(certificate) == [f"spiffe://{DOMAIN}/controller/name", CONTROLLER_DNS_NAME]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_a_controller_is_believed_by_a_clock_that_starts_in_1970(authority: CertificateAuthority) -> None:
    certificate = issued(authority, Role.CONTROLLER)

    assert certificate.not_valid_before_utc == datetime(1970, 1, 1, tzinfo=UTC)


def test_nothing_outlives_the_authority(authority: CertificateAuthority) -> None:
    key = public_key_of(new_key().public_key())

    made = authority.issue(Peer(DOMAIN, Role.AGENT, "a"), key, now=authority.not_after - timedelta(days=1))

    assert made.not_after == authority.not_after


def test_an_authority_comes_back_from_its_files(authority: CertificateAuthority) -> None:
    loaded = CertificateAuthority.load(authority.certificate_pem, authority.key_pem)

    assert loaded.sha256 == authority.sha256


def test_an_authority_names_the_trust_domain_that_it_signs_for(authority: CertificateAuthority) -> None:
    again = CertificateAuthority.load(authority.certificate_pem, authority.key_pem)

    assert again.trust_domain == DOMAIN


def test_a_key_of_another_authority_is_refused(authority: CertificateAuthority) -> None:
    with pytest.raises(ValueError, match="not that of the certificate"):
        CertificateAuthority.load(
            authority.certificate_pem, CertificateAuthority.make(trust_domain=DOMAIN, now=NOON).key_pem
        )


def test_a_request_gives_its_key() -> None:
    key = new_key()

    assert checked_csr(made_csr(key)) == public_key_of(key.public_key())


@given(st.binary(max_size=300))
def test_bytes_that_are_no_request_are_refused(content: bytes) -> None:
    with pytest.raises(InvalidRequest):
        checked_csr(content)


SAMPLE_CSR = made_csr(new_key())
# Before the signature, which comes last, stands how many of its bits are not used: of those that are zero some may be.
UNUSED_BITS_AT = len(SAMPLE_CSR) - len(x509.load_der_x509_csr(SAMPLE_CSR).signature) - 1


@settings(max_examples=500)
@given(st.integers(0, len(SAMPLE_CSR) - 1).filter(lambda place: place != UNUSED_BITS_AT), st.integers(1, 255))
def test_a_request_with_any_byte_changed_is_refused(place: int, change: int) -> None:
    changed = bytearray(SAMPLE_CSR)
    changed[place] ^= change

    with pytest.raises(InvalidRequest):
        checked_csr(bytes(changed))


@given(st.binary(max_size=80))
def test_bytes_that_are_no_signature_prove_nothing(signature: bytes) -> None:
    assert not is_signed_by(public_key_of(new_key().public_key()), signature, b"message")


def test_a_signature_proves_its_own_message_only() -> None:
    key = new_key()
    signature = key.sign(b"message", ec.ECDSA(hashes.SHA256()))

    assert is_signed_by(public_key_of(key.public_key()), signature, b"message")
    assert not is_signed_by(public_key_of(key.public_key()), signature, b"other")


# ---- key files ------------------------------------------------------------------------------------------------


def test_a_key_file_is_for_its_owner_only(tmp_path: Path) -> None:
    keys = AuthorityKeys(tmp_path / "keys" / "authorities")
    keys.save("ab" * 32, b"secret")

    path = tmp_path / "keys" / "authorities" / f"{'ab' * 32}.pem"
    assert [each.stat().st_mode & 0o777 for each in (path, path.parent, path.parent.parent)] == [0o600, 0o700, 0o700]
    assert keys.load("ab" * 32) == b"secret"


def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    keys = AuthorityKeys(tmp_path)
    keys.save("ab" * 32, b"secret")
    (tmp_path / f"{'ab' * 32}.pem").chmod(0o644)

    with pytest.raises(Unavailable, match="chmod 600"):
        keys.load("ab" * 32)


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="restore it from the backup"):
        AuthorityKeys(tmp_path).load("ab" * 32)
