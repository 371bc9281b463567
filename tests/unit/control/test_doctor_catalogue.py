"""How long the catalogue holds, and the certificate of the HTTP port, as the doctor judges them."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from controller.cli.doctor.catalogue import judge_catalogue
from controller.cli.doctor.certificates import shown_certificate
from controller.settings import Settings
from core.doctor import Finding, Verdict
from tests.support.https_certificate import Pair, TestAuthority

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)


def catalogue(**days: float) -> dict[str, bytes]:
    return {
        role: json.dumps({"signed": {"expires": f"{NOW + timedelta(days=left):%Y-%m-%dT%H:%M:%SZ}"}}).encode()
        for role, left in days.items()
    }


def test_a_catalogue_that_holds_is_fine() -> None:
    found = judge_catalogue(catalogue(root=300, targets=60, snapshot=5, timestamp=4), now=NOW)
    assert (found.verdict, "timestamp is the first" in found.found) == (Verdict.OK, True)


@pytest.mark.parametrize(
    ("days", "verdict", "role", "remedy"),
    [
        ({"targets": 3, "timestamp": 5}, Verdict.WARNING, "targets expires", "signing stage"),
        ({"targets": -1, "timestamp": 5}, Verdict.PROBLEM, "targets expired", "signing stage"),
        ({"targets": 60, "timestamp": -1}, Verdict.PROBLEM, "timestamp expired", "run the controller"),
        ({"targets": 60, "snapshot": 0.5}, Verdict.WARNING, "snapshot expires", "run the controller"),
    ],
)
def test_a_role_that_ends_is_named_with_who_must_sign(
    days: dict[str, float], verdict: Verdict, role: str, remedy: str
) -> None:
    found = judge_catalogue(catalogue(**days), now=NOW)
    assert found.verdict is verdict
    assert role in found.found
    assert remedy in found.remedy


def test_no_catalogue_is_not_judged() -> None:
    assert judge_catalogue({}, now=NOW).verdict is Verdict.SKIPPED


@pytest.fixture(scope="module")
def pair() -> Pair:
    # Good for an hour from now.
    return TestAuthority().pair()


def judged(folder: Path, pair: Pair, *, now: datetime, key: bytes | None = None, mode: int = 0o600) -> list[Finding]:
    (folder / "chain.pem").write_bytes(pair.chain)
    (folder / "key.pem").write_bytes(pair.key if key is None else key)
    (folder / "key.pem").chmod(mode)
    settings = Settings(data_dir=folder, http_certificate=folder / "chain.pem", http_key=folder / "key.pem")
    found = shown_certificate(settings, now=now, is_running=False)
    return [found] if isinstance(found, Finding) else list(found)


def test_the_operators_own_certificate_is_judged_by_its_dates_and_its_key(tmp_path: Path, pair: Pair) -> None:
    now = datetime.now(UTC)
    soon, private = judged(tmp_path, pair, now=now)
    late, _ = judged(tmp_path, pair, now=now + timedelta(hours=2))
    _, readable = judged(tmp_path, pair, now=now, mode=0o644)

    assert (soon.verdict, private.verdict) == (Verdict.WARNING, Verdict.OK)
    assert (late.verdict, readable.verdict) == (Verdict.PROBLEM, Verdict.PROBLEM)


def test_a_key_of_another_certificate_is_a_problem(tmp_path: Path, pair: Pair) -> None:
    [found] = judged(tmp_path, pair, now=datetime.now(UTC), key=TestAuthority().pair().key)
    assert found.verdict is Verdict.PROBLEM
    assert "http_key" in found.remedy
