import ssl
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from core.errors import NotFound, Untrusted
from core.grpc_transport import TlsIdentity
from core.tls_files import IDENTITY_FILE, TRUST_FILE, folder_context, read_tls_identity, write_tls_identity
from tests.support.enrolment import FakeAuthority, pem_of_key

KEY = b"-----BEGIN PRIVATE KEY-----\nkey\n-----END PRIVATE KEY-----"
CHAIN = b"-----BEGIN CERTIFICATE-----\nchain\n-----END CERTIFICATE-----\n"
TRUST = b"-----BEGIN CERTIFICATE-----\nauthority\n-----END CERTIFICATE-----\n"
WRITTEN = TlsIdentity(certificate_chain=CHAIN, private_key=KEY, trust_bundle=TRUST)


def test_what_is_written_is_read_with_key_and_chain_in_one_file(tmp_path: Path) -> None:
    write_tls_identity(tmp_path, WRITTEN)
    pair = KEY + b"\n" + CHAIN
    assert read_tls_identity(tmp_path) == TlsIdentity(pair, pair, TRUST)


def test_no_other_user_reads_a_key(tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    write_tls_identity(folder, WRITTEN)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())}
    assert modes == {"tls": 0o700, IDENTITY_FILE: 0o600, TRUST_FILE: 0o600}


@pytest.mark.parametrize("missing", [IDENTITY_FILE, TRUST_FILE])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    write_tls_identity(tmp_path, WRITTEN)
    (tmp_path / missing).unlink()
    with pytest.raises(NotFound, match=f"{missing}: No such file or directory; expected {IDENTITY_FILE} and"):
        read_tls_identity(tmp_path)


def test_a_reader_that_began_before_a_replacement_has_the_old_pair_whole(tmp_path: Path) -> None:
    write_tls_identity(tmp_path, WRITTEN)
    with (tmp_path / IDENTITY_FILE).open("rb") as reader:
        begun = reader.read(10)
        write_tls_identity(tmp_path, TlsIdentity(CHAIN * 2, KEY * 2, TRUST))
        assert begun + reader.read() == KEY + b"\n" + CHAIN
    assert read_tls_identity(tmp_path).private_key == KEY * 2 + b"\n" + CHAIN * 2


def test_a_replacement_leaves_no_other_file(tmp_path: Path) -> None:
    for _ in range(2):
        write_tls_identity(tmp_path, WRITTEN)
    assert {path.name for path in tmp_path.iterdir()} == {IDENTITY_FILE, TRUST_FILE}


@pytest.mark.parametrize("missing", [IDENTITY_FILE, TRUST_FILE])
def test_a_client_without_a_file_is_told_which(tmp_path: Path, missing: str) -> None:
    write_tls_identity(tmp_path, made_identity())
    (tmp_path / missing).unlink()
    with pytest.raises(NotFound, match=f"{missing}.*: No such file or directory"):
        folder_context(tmp_path)


def test_a_client_whose_key_is_anothers_is_told_so(tmp_path: Path) -> None:
    write_tls_identity(tmp_path, replace(made_identity(), private_key=made_identity().private_key))
    with pytest.raises(Untrusted, match="KEY_VALUES_MISMATCH"):
        folder_context(tmp_path)


def test_a_client_whose_files_are_no_certificates_is_told_so(tmp_path: Path) -> None:
    write_tls_identity(tmp_path, WRITTEN)
    with pytest.raises(Untrusted, match="expected matching PEM files"):
        folder_context(tmp_path)


def test_a_client_speaks_nothing_older_than_tls_1_2_and_checks_the_name(tmp_path: Path) -> None:
    write_tls_identity(tmp_path, made_identity())
    context = folder_context(tmp_path)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)


def made_identity() -> TlsIdentity:
    authority, key = FakeAuthority(), ec.generate_private_key(ec.SECP256R1())
    return TlsIdentity(authority.certified(key.public_key(), "gate-1"), pem_of_key(key), authority.pem)
