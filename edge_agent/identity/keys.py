"""What needs cryptography: the agent's key, its certificate request, the proof for a renewal, the check of a reply.

Only the child process (`edge_agent.identity.__main__`) and the enrolment command import this module: the library costs
12 MB of memory (measured), which the running agent does not have to spare.
"""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.utils import CryptographyDeprecationWarning

from core.errors import Untrusted
from core.spiffe import Peer, Role

# Before nonce and request in what a renewal signs, so that the signature says nothing anywhere else (identity.proto).
RENEWAL_CONTEXT = b"nanofleet renew v1\n"
# Chosen: two while authorities rotate, and some for a fleet that was joined from several.
MAX_AUTHORITIES = 8


@dataclass(frozen=True, slots=True)
class Validity:
    not_before: datetime
    not_after: datetime


def new_key() -> bytes:
    """Return a new P-256 private key in PEM (PKCS #8, not encrypted: the file's mode protects it)."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def certificate_request(key: bytes) -> bytes:
    """Return a PKCS #10 request in DER for `key`; it names nobody, since the controller chooses the name."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(_private(key), hashes.SHA256()).public_bytes(Encoding.DER)


def sign_renewal(key: bytes, *, nonce: bytes, csr: bytes) -> bytes:
    """Return the proof that the holder of `key` asks for `csr` now: ECDSA with SHA-256, DER."""
    statement = RENEWAL_CONTEXT + nonce + hashlib.sha256(csr).digest()
    return _private(key).sign(statement, ec.ECDSA(hashes.SHA256()))


def check_credential(chain: bytes, bundle: bytes, *, key: bytes, peer: Peer) -> Validity:
    """Return from when to when `chain` is valid, after checking that it makes the holder of `key` the agent `peer`.

    Raises:
        Untrusted: another key, another name, or not issued by an authority in `bundle`.
    """
    with _well_formed("certificate"):
        return _checked_leaf(_certificates(chain, what="certificate")[0], bundle, key=key, peer=peer)


def _checked_leaf(leaf: x509.Certificate, bundle: bytes, *, key: bytes, peer: Peer) -> Validity:
    if _public_bytes(leaf.public_key()) != _public_bytes(_private(key).public_key()):
        raise Untrusted("certificate: expected one for the key that was sent, got one for another key")
    names = _uris(leaf)
    if peer.role is not Role.AGENT or names != [str(peer)]:
        raise Untrusted(f"certificate: expected the name {peer}, got {names}")
    authorities = _certificates(bundle, what="trust bundle")
    if not any(_issued(authority, leaf) for authority in authorities):
        raise Untrusted("certificate: expected one issued by an authority in the trust bundle, got another issuer")
    return Validity(leaf.not_valid_before_utc, leaf.not_valid_after_utc)


def check_bundle(bundle: bytes, *, now: datetime) -> tuple[bytes, ...]:
    """Return the SHA-256 of each authority in `bundle`.

    Raises:
        Untrusted: a certificate in it is no authority, or every one has expired at `now`.
    """
    with _well_formed("trust bundle"):
        return _checked_authorities(_certificates(bundle, what="trust bundle"), now=now)


def _checked_authorities(authorities: Sequence[x509.Certificate], *, now: datetime) -> tuple[bytes, ...]:
    if len(authorities) > MAX_AUTHORITIES:
        raise Untrusted(f"trust bundle: expected at most {MAX_AUTHORITIES} authorities, got {len(authorities)}")
    for authority in authorities:
        if not _is_authority(authority):
            raise Untrusted(f"trust bundle: expected authorities only, got {authority.subject.rfc4514_string()[:120]}")
    # Not the beginning: a machine that starts in 1970 must be able to take a bundle too.
    if all(authority.not_valid_after_utc < now for authority in authorities):
        raise Untrusted(f"trust bundle: expected an authority that is valid at {now:%Y-%m-%d}, all have expired")
    return tuple(authority.fingerprint(hashes.SHA256()) for authority in authorities)


def pinned_authority(chain: Sequence[bytes], *, sha256: bytes, now: datetime) -> bytes:
    """Return, in PEM, the certificate of `chain` (DER) whose SHA-256 is `sha256`.

    Raises:
        Untrusted: it is not in the chain, or this machine's clock is before the beginning of the chain.
    """
    found = [certificate for certificate in chain if hashlib.sha256(certificate).digest() == sha256]
    if not found:
        raise Untrusted(
            "controller: expected the authority that the token names, got another: the token is of another fleet, or "
            "somebody sits in between; nothing was sent"
        )
    with _well_formed("controller: certificate"), _strict():
        begins = max(x509.load_der_x509_certificate(certificate).not_valid_before_utc for certificate in chain)
        authority = x509.load_der_x509_certificate(found[0]).public_bytes(Encoding.PEM)
    if now < begins:
        raise Untrusted(
            f"controller: its certificate begins on {begins:%Y-%m-%d %H:%M} UTC, and this machine's clock says "
            f"{now:%Y-%m-%d %H:%M}; set the clock"
        )
    return authority


@contextmanager
def _well_formed(what: str) -> Iterator[None]:
    """Turn what the library raises for a hostile certificate, here or where a part of it is first read, into ours."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        UnsupportedAlgorithm,
        CryptographyDeprecationWarning,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
    ) as error:
        raise Untrusted(f"{what}: expected a well-formed certificate, got {type(error).__name__}") from error


@contextmanager
def _strict() -> Iterator[None]:
    """Refuse what the library still reads but will not for ever, such as serial numbers that are not positive.

    RFC 5280, section 4.1.2.2.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", CryptographyDeprecationWarning)
        yield


def _certificates(pem: bytes, *, what: str) -> list[x509.Certificate]:
    try:
        with _strict():
            return x509.load_pem_x509_certificates(pem)
    except (ValueError, x509.InvalidVersion, CryptographyDeprecationWarning) as error:
        raise Untrusted(f"{what}: expected certificates in PEM, got {len(pem)} bytes of something else") from error


def _private(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(pem, password=None)
    except ValueError as error:
        raise Untrusted("key: expected a private key in PEM, got something else; enrol again") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Untrusted(f"key: expected an elliptic-curve key, got {type(key).__name__}; enrol again")
    return key


def _public_bytes(key: object) -> bytes | None:
    """Return the key in DER; None for a kind of key that is never ours."""
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return None
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _issued(authority: x509.Certificate, leaf: x509.Certificate) -> bool:
    try:
        leaf.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return _is_authority(authority)
