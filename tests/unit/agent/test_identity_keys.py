"""What is believed of a certificate: hostile ones are refused, and nothing else happens."""

import base64
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from core.errors import Untrusted
from core.spiffe import Peer, Role
from edge_agent.identity import keys
from tests.support.enrolment import DOMAIN, FakeAuthority, pem_of_key

NOW = datetime.now(UTC)
AUTHORITY = FakeAuthority()
KEY = ec.generate_private_key(ec.SECP256R1())
PEER = Peer(DOMAIN, Role.AGENT, "gate-1")
LEAF = x509.load_pem_x509_certificate(AUTHORITY.certified(KEY.public_key(), "gate-1")).public_bytes(Encoding.DER)


def pem_of(der: bytes) -> bytes:
    body = base64.encodebytes(der)
    return b"-----BEGIN CERTIFICATE-----\n" + body + b"-----END CERTIFICATE-----\n"


flips = st.lists(st.tuples(st.integers(0, len(LEAF) - 1), st.integers(0, 255)), min_size=1, max_size=4)


@given(flips)
def test_a_certificate_with_other_bytes_is_never_believed(changes: list[tuple[int, int]]) -> None:
    changed = bytearray(LEAF)
    for at, value in changes:
        changed[at] = value
    if bytes(changed) == LEAF:
        return
    with pytest.raises(Untrusted):
        keys.check_credential(pem_of(bytes(changed)), AUTHORITY.pem, key=pem_of_key(KEY), peer=PEER)


@given(flips)
def test_a_bundle_with_other_bytes_is_taken_or_refused_and_breaks_nothing(changes: list[tuple[int, int]]) -> None:
    changed = bytearray(AUTHORITY.certificate.public_bytes(Encoding.DER))
    for at, value in changes:
        changed[at % len(changed)] = value
    try:
        keys.check_bundle(pem_of(bytes(changed)), now=NOW)
    except Untrusted:
        return


@given(st.binary(max_size=200))
def test_bytes_that_are_no_certificate_are_refused(content: bytes) -> None:
    for chain in (content, pem_of(content)):
        with pytest.raises(Untrusted):
            keys.check_credential(chain, AUTHORITY.pem, key=pem_of_key(KEY), peer=PEER)
        with pytest.raises(Untrusted):
            keys.check_bundle(chain, now=NOW)
    with pytest.raises(Untrusted):
        keys.pinned_authority([content], sha256=AUTHORITY.sha256, now=NOW)


def test_a_chain_that_holds_what_is_no_certificate_is_refused_though_the_authority_is_in_it() -> None:
    authority = AUTHORITY.certificate.public_bytes(Encoding.DER)
    with pytest.raises(Untrusted, match="well-formed"):
        keys.pinned_authority([b"\x30\x00", authority], sha256=AUTHORITY.sha256, now=NOW)


def test_a_key_of_another_kind_is_refused() -> None:
    other = rsa.generate_private_key(65537, 2048)
    pem = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(Untrusted, match="elliptic-curve"):
        keys.certificate_request(pem)


def test_the_request_names_nobody() -> None:
    request = x509.load_der_x509_csr(keys.certificate_request(keys.new_key()))
    assert request.is_signature_valid
    assert list(request.subject) == []
    assert list(request.extensions) == []


def test_a_serial_number_that_is_not_positive_is_refused() -> None:
    der = AUTHORITY.certificate.public_bytes(Encoding.DER)
    # The first INTEGER of some length is the serial number; its sign is the top bit of its first byte.
    at = der.index(b"\x02", 10)
    changed = bytearray(der)
    while changed[at + 1] < 8:
        at = der.index(b"\x02", at + 1)
    changed[at + 2] |= 0x80
    with pytest.raises(Untrusted):
        keys.check_bundle(pem_of(bytes(changed)), now=NOW)
