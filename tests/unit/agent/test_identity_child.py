"""The child process that does cryptography: its answers, its refusals, and what keeps the agent light."""

import json
import subprocess
import sys
from base64 import b64decode, b64encode
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from core.errors import InternalError, Unavailable, Untrusted
from edge_agent.identity import keys
from edge_agent.identity.child import ask_child
from tests.support.enrolment import DOMAIN, FakeAuthority, pem_of_key

PEER = f"spiffe://{DOMAIN}/agent/gate-1"
AUTHORITY = FakeAuthority()
KEY = ec.generate_private_key(ec.SECP256R1())


def question(**changes: str) -> dict[str, str]:
    return {
        "chain": AUTHORITY.certified(KEY.public_key(), "gate-1").decode(),
        "bundle": AUTHORITY.pem.decode(),
        "key": pem_of_key(KEY).decode(),
        "peer": PEER,
        "now": datetime.now(UTC).isoformat(),
        **changes,
    }


async def test_it_makes_a_key_and_proves_who_asks() -> None:
    nonce = b"\x00once\xff"
    body = {"signer": pem_of_key(KEY).decode(), "key": "", "nonce": b64encode(nonce).decode()}
    answer = await ask_child("renewal", body)
    made = load_pem_private_key(answer["key"].encode(), None)
    assert isinstance(made, ec.EllipticCurvePrivateKey)
    assert isinstance(made.curve, ec.SECP256R1)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(b64decode(answer["csr"]))
    statement = b"nanofleet renew v1\n" + nonce + digest.finalize()
    KEY.public_key().verify(b64decode(answer["signature"]), statement, ec.ECDSA(hashes.SHA256()))


async def test_a_key_that_is_given_is_kept() -> None:
    key = keys.new_key().decode()
    answer = await ask_child("renewal", {"signer": pem_of_key(KEY).decode(), "key": key, "nonce": ""})
    assert answer["key"] == key


async def test_it_tells_how_long_a_credential_holds() -> None:
    answer = await ask_child("credential", question())
    life = datetime.fromisoformat(answer["not_after"]) - datetime.fromisoformat(answer["not_before"])
    assert life == timedelta(days=7)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"key": keys.new_key().decode()}, "for another key"),
        ({"peer": f"spiffe://{DOMAIN}/agent/gate-2"}, "expected the name"),
        ({"peer": f"spiffe://{DOMAIN}/controller/gate-1"}, "expected the name"),
        ({"bundle": FakeAuthority().pem.decode()}, "another issuer"),
        ({"bundle": ""}, "expected certificates in PEM"),
        ({"chain": "nothing"}, "expected certificates in PEM"),
        ({"bundle": AUTHORITY.certified(KEY.public_key(), "gate-1").decode()}, "authorities only"),
        ({"bundle": AUTHORITY.pem.decode() * 9}, "at most 8"),
        ({"now": datetime(2100, 1, 1, tzinfo=UTC).isoformat()}, "all have expired"),
    ],
)
async def test_a_credential_that_does_not_hold_is_refused(changes: dict[str, str], reason: str) -> None:
    with pytest.raises(Untrusted, match=reason):
        await ask_child("credential", question(**changes))


async def test_a_bundle_is_taken_by_a_clock_before_its_beginning() -> None:
    body = {"bundle": AUTHORITY.pem.decode(), "now": datetime(1970, 1, 1, tzinfo=UTC).isoformat()}
    assert await ask_child("bundle", body) == {}


async def test_a_key_that_is_none_is_refused() -> None:
    with pytest.raises(Untrusted, match="expected a private key in PEM"):
        await ask_child("renewal", {"signer": "none", "key": "", "nonce": ""})


@pytest.mark.parametrize(("command", "body"), [("unknown", {}), ("renewal", {}), ("bundle", {"bundle": "x"})])
async def test_a_call_that_it_does_not_know_is_a_defect(command: str, body: dict[str, str]) -> None:
    with pytest.raises(InternalError, match="code 2"):
        await ask_child(command, body)


async def test_a_child_that_takes_too_long_is_ended() -> None:
    with pytest.raises(Unavailable, match=r"within 0\.001 s"):
        await ask_child("bundle", {"bundle": "", "now": ""}, timeout_s=0.001)


async def test_the_working_directory_shadows_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "orjson.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    answer = await ask_child("credential", question())
    assert answer["not_after"]


@pytest.mark.parametrize("module", ["folder", "channel", "renewal", "exchange", "child"])
def test_what_the_agent_imports_brings_no_cryptography(module: str) -> None:
    script = f"import json, sys, edge_agent.identity.{module}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    names = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert not names & {"cryptography", "tuf", "securesystemslib", "_cffi_backend"}


def test_the_child_brings_no_grpc() -> None:
    script = "import json, sys, edge_agent.identity.__main__; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert "grpc" not in json.loads(done.stdout)
