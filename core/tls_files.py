"""A TlsIdentity as two files: `identity.pem`, the private key and the certificate chain in one, and `trust.pem`.

Key and chain are replaced together by one rename, so a reader never finds a key beside another's certificate. Both
halves may be handed to a TLS library as they are: each looks for the kind of block that it needs.
"""

import ssl
from pathlib import Path

from core.atomic_files import write_atomically
from core.errors import NotFound, Untrusted
from core.grpc_transport import TlsIdentity

IDENTITY_FILE = "identity.pem"
TRUST_FILE = "trust.pem"


def write_tls_identity(folder: Path, identity: TlsIdentity) -> None:
    """Write both files, readable by their owner only; makes the folder."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # First: whoever reads in between trusts more than it needs, never less.
    write_atomically(folder / TRUST_FILE, identity.trust_bundle, mode=0o600)
    pair = identity.private_key.rstrip() + b"\n" + identity.certificate_chain
    write_atomically(folder / IDENTITY_FILE, pair, mode=0o600)


def client_context(*, certificate: Path, key: Path, trust: Path) -> ssl.SSLContext:
    """Return what a client shows to a server that is no controller of ours, such as a broker, and whom it believes.

    The server must be for the name that is dialled. Blocks for a file's time.

    Raises:
        NotFound: a file is missing or may not be read.
        Untrusted: a file is no PEM, or key and certificate do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Small devices have no 1.3 yet, and brokers serve them too.
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    _load(context, certificate, key, trust)
    return context


def server_context(*, certificate: Path, key: Path, trust: Path) -> ssl.SSLContext:
    """Return what a server shows, whose clients must show certificates that `trust` vouches for.

    Blocks for a file's time. Raises like `client_context`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # As for `client_context`.
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
    context.verify_mode = ssl.CERT_REQUIRED
    # Neither end remembers a session: who was certified under an authority that is dropped shakes hands anew.
    context.num_tickets = 0
    _load(context, certificate, key, trust)
    return context


def _load(context: ssl.SSLContext, certificate: Path, key: Path, trust: Path) -> None:
    try:
        context.load_verify_locations(trust)
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise Untrusted(f"{certificate}, {key}, {trust}: expected matching PEM files, got {error.reason}") from error
    except OSError as error:
        raise NotFound(f"{certificate}, {key}, {trust}: {error.strerror}") from error


def folder_context(folder: Path) -> ssl.SSLContext:
    """Return `client_context` of what `write_tls_identity` wrote."""
    pair = folder / IDENTITY_FILE
    return client_context(certificate=pair, key=pair, trust=folder / TRUST_FILE)


def read_tls_identity(folder: Path) -> TlsIdentity:
    """Return what `write_tls_identity` wrote.

    Raises:
        NotFound: a file is missing or may not be read.
    """
    try:
        pair, trust = (folder / IDENTITY_FILE).read_bytes(), (folder / TRUST_FILE).read_bytes()
    except OSError as error:
        raise NotFound(f"{error.filename}: {error.strerror}; expected {IDENTITY_FILE} and {TRUST_FILE}") from error
    return TlsIdentity(pair, pair, trust)
