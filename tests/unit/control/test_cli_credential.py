"""Credential files: where they are looked for, who may read them, what they say, and to whom a secret is shown."""

import json
from pathlib import Path
from typing import Any

import pytest

from controller.cli.client import ControllerClient, Refused
from controller.cli.credential import (
    Credential,
    CredentialFile,
    default_path,
    read_credential,
    write_credential,
)
from controller.cli.options import Options
from core.errors import InvalidRequest

URL = "https://controller.example:7080"
SECRET = "nfo1.secret"
ADA = Credential(controller=URL, name="ada", secret=SECRET)


def written(path: Path, *, mode: int = 0o600, **changes: Any) -> Path:
    content = {"controller": URL, "name": "ada", "secret": SECRET, **changes}
    path.write_text(json.dumps(content))
    path.chmod(mode)
    return path


# ---- the file ---------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_nobody_elses_to_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "credential.json"
    write_credential(path, ADA)

    assert read_credential(path) == CredentialFile(path, ADA)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_file_that_others_can_use_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path / "credential.json", mode=mode)
    with pytest.raises(InvalidRequest, match=f"chmod 600 {path}"):
        read_credential(path)


def test_no_file_is_no_credential(tmp_path: Path) -> None:
    assert read_credential(tmp_path / "none.json").credential is None


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="credential file"):
        read_credential(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"secret": f"{SECRET}\n"},
        {"secret": f"{SECRET}é"},
        {"secret": SECRET * 100},
        {"controller": "ftp://x"},
        {"more": 1},
    ],
)
def test_a_file_that_is_no_credential_is_refused_without_repeating_it(tmp_path: Path, changes: Any) -> None:
    path = written(tmp_path / "credential.json", **changes)
    with pytest.raises(InvalidRequest, match="as `nanofleet controller init` writes it") as refusal:
        read_credential(path)

    assert SECRET not in str(refusal.value)
    assert refusal.value.__cause__ is None


def test_a_credential_does_not_show_its_secret() -> None:
    assert SECRET not in repr(ADA)


def test_files_stand_where_the_desktop_says(tmp_path: Path) -> None:
    assert default_path({"XDG_CONFIG_HOME": str(tmp_path)}) == tmp_path / "nanofleet" / "credential.json"
    for environment in ({}, {"XDG_CONFIG_HOME": ""}, {"XDG_CONFIG_HOME": "relative"}):
        assert default_path(environment) == Path.home() / ".config" / "nanofleet" / "credential.json"


def test_a_bundle_may_stand_in_the_file_or_beside_it(tmp_path: Path) -> None:
    pem = "-----BEGIN CERTIFICATE-----\n"
    (tmp_path / "ca.pem").write_text(pem)
    path = tmp_path / "credential.json"

    for bundle in (pem, "ca.pem", str(tmp_path / "ca.pem")):
        assert CredentialFile(path, ADA.model_copy(update={"trust_bundle": bundle})).trust_bundle() == pem
    assert CredentialFile(path, ADA).trust_bundle() is None


@pytest.mark.parametrize("bundle", ["missing.pem", "-----BEGIN CERTIFICATE-----\nnothing"])
def test_a_bundle_that_is_none_is_refused_with_the_remedy(tmp_path: Path, bundle: str) -> None:
    file = CredentialFile(tmp_path / "credential.json", ADA.model_copy(update={"trust_bundle": bundle}))
    with pytest.raises(InvalidRequest, match="trust_bundle"):
        file.tls()


# ---- to whom a secret is shown ----------------------------------------------------------------------------------


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no such file"):
        Options(None, tmp_path / "none.json").credential_file()


def test_a_secret_goes_to_its_own_controller(tmp_path: Path) -> None:
    file = CredentialFile(tmp_path, ADA)

    assert Options(None).shown_to(URL, file) == ADA
    assert Options(URL).shown_to(f"{URL}/", file) == ADA


@pytest.mark.parametrize("other", ["http://controller.example:7080", "https://controller.example", "https://evil:7080"])
def test_a_secret_goes_elsewhere_only_when_both_were_named(tmp_path: Path, other: str) -> None:
    file = CredentialFile(tmp_path, ADA)

    assert Options(other).shown_to(other, file) is None
    assert Options(other, tmp_path).shown_to(other, file) == ADA


def test_a_secret_does_not_cross_the_network_in_clear(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="in clear"):
        ControllerClient("http://192.0.2.1:7080", credential_file=CredentialFile(tmp_path, ADA))
    with ControllerClient("http://127.0.0.1:7080", credential_file=CredentialFile(tmp_path, ADA)) as client:
        assert client.credential == ADA
