"""A TlsIdentity as two files: `identity.pem`, the private key and the certificate chain in one, and `trust.pem`.

Key and chain are replaced together by one rename, so a reader never finds a key beside another's certificate. Both
halves may be handed to a TLS library as they are: each looks for the kind of block that it needs.
"""

from pathlib import Path

from core.atomic_files import write_atomically
from core.errors import NotFound
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
