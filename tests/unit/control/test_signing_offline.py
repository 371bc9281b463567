"""Keys that are not on the controller: what it wants published is staged, carried to them, signed and brought back."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.signing.bundle import FORMAT, MAX_BUNDLE_BYTES, Bundle
from controller.signing.keys import KeyFiles, KeyRing, PrivateKey, Signer
from controller.signing.model import KeyRole
from core.errors import Conflict, InvalidRequest, NotFound, TooLarge, Untrusted
from tests.support.catalogues import METER, START, SignedWorld, TufClient, made_release

# What TUF metadata is made of, so that some of what is made up gets far.
_KEYS = ["root", "targets", "signed", "signatures", "_type", "version", "expires", "keys", "roles", "delegations"]

FIRST = made_release(METER, 1)
SECOND = made_release(METER, 2)


@pytest.fixture
async def world(tmp_path: Path) -> SignedWorld:
    world = SignedWorld(tmp_path / "controller")
    await world.catalogue.prepare()
    return world


@pytest.fixture
async def client(world: SignedWorld, tmp_path: Path) -> TufClient:
    return TufClient(world, tmp_path / "client")


@pytest.fixture
def safe(world: SignedWorld) -> Mapping[str, Signer]:
    """The keys of root and targets, where the controller does not see them."""
    return KeyRing(KeyFiles(world.move_keys(KeyRole.ROOT, KeyRole.TARGETS))).metadata_signers()


def carried(bundle: Bundle) -> Bundle:
    """Take a bundle to another machine, or back, as the file that it is."""
    return Bundle.from_bytes(bundle.to_bytes())


async def test_without_its_keys_a_release_is_staged_and_not_published(
    world: SignedWorld, client: TufClient, safe: Mapping[str, Signer]
) -> None:
    await world.catalogue.release([FIRST])

    assert set(world.catalogue.bundle().staged) == {"targets", "family-meter"}
    assert not await client.finds(FIRST)
    with pytest.raises(Conflict, match="nanofleet signing stage"):
        world.catalogue.require_released(FIRST.slot)


async def test_what_is_signed_elsewhere_is_published(
    world: SignedWorld, client: TufClient, safe: Mapping[str, Signer]
) -> None:
    await world.catalogue.release([FIRST])
    bundle = carried(world.catalogue.bundle())

    await world.catalogue.publish_signed(carried(bundle.signed(safe, now=START)))

    assert await client.finds(FIRST)
    world.catalogue.require_released(FIRST.slot)
    with pytest.raises(NotFound):
        world.catalogue.bundle()


async def test_what_is_staged_survives_a_restart(world: SignedWorld, safe: Mapping[str, Signer]) -> None:
    await world.catalogue.release([FIRST])
    staged = world.catalogue.bundle()
    again = world.restarted()

    await again.prepare()
    await again.release([FIRST])

    assert again.bundle() == staged


async def test_releases_gather_until_they_are_signed(
    world: SignedWorld, client: TufClient, safe: Mapping[str, Signer]
) -> None:
    await world.catalogue.release([FIRST])
    await world.catalogue.release([SECOND])

    await world.catalogue.publish_signed(world.catalogue.bundle().signed(safe, now=START))

    assert await client.finds(FIRST)
    assert await client.finds(SECOND)


async def test_a_bundle_from_before_the_last_change_is_refused(world: SignedWorld, safe: Mapping[str, Signer]) -> None:
    await world.catalogue.release([FIRST])
    old = world.catalogue.bundle().signed(safe, now=START)
    await world.catalogue.release([SECOND])

    with pytest.raises(Conflict, match="stage` again"):
        await world.catalogue.publish_signed(old)


async def test_an_unsigned_bundle_is_refused_and_says_whose_signature_is_missing(
    world: SignedWorld, safe: Mapping[str, Signer]
) -> None:
    await world.catalogue.release([FIRST])
    (targets,) = (role for role in (await world.catalogue.status()).roles if role.role == "targets")

    with pytest.raises(Untrusted, match=targets.key_ids[0][:16]):
        await world.catalogue.publish_signed(world.catalogue.bundle())

    assert targets.present == ()


async def test_a_signature_that_does_not_hold_counts_for_nothing(
    world: SignedWorld, client: TufClient, safe: Mapping[str, Signer]
) -> None:
    await world.catalogue.release([FIRST])
    forger = PrivateKey.generate()
    forged = world.catalogue.bundle().signed(dict.fromkeys(safe, forger), now=START)

    with pytest.raises(Untrusted):
        await world.catalogue.publish_signed(forged)

    assert not await client.finds(FIRST)
    assert all(b'"signatures":[]' in content for content in world.catalogue.bundle().staged.values())


async def test_a_root_is_signed_by_one_holder_after_the_other(
    world: SignedWorld, client: TufClient, safe: Mapping[str, Signer]
) -> None:
    rotation = await world.catalogue.rotate(KeyRole.TIMESTAMP)
    root = (await world.catalogue.status()).roles[0]
    one, two = ({key_id: safe[key_id]} for key_id in root.key_ids[:2])

    with pytest.raises(Untrusted):
        await world.catalogue.publish_signed(world.catalogue.bundle().signed(one, now=START))
    await world.catalogue.publish_signed(world.catalogue.bundle().signed(two, now=START))

    assert not rotation.is_published
    assert world.catalogue.versions().root == 2
    assert not await client.finds(FIRST)


async def test_a_root_that_waits_does_not_hold_up_releases(world: SignedWorld, client: TufClient) -> None:
    world.move_keys(KeyRole.ROOT)
    await world.catalogue.rotate(KeyRole.TIMESTAMP)

    await world.catalogue.release([FIRST])

    assert await client.finds(FIRST)
    assert set(world.catalogue.bundle().staged) == {"root"}


async def test_a_revocation_is_published_beside_a_root_that_waits(world: SignedWorld) -> None:
    await world.catalogue.release([FIRST])
    world.move_keys(KeyRole.ROOT)
    await world.catalogue.rotate(KeyRole.TIMESTAMP)

    assert await world.catalogue.revoke(METER, versions=[1])


async def test_a_targets_key_is_rotated_with_all_that_it_signed(world: SignedWorld, client: TufClient) -> None:
    await world.catalogue.release([FIRST])
    safe = KeyRing(KeyFiles(world.move_keys(KeyRole.ROOT, KeyRole.TARGETS))).metadata_signers()
    new = PrivateKey.generate()
    await world.catalogue.rotate(KeyRole.TARGETS, public_key=new.public_key)
    await world.catalogue.release([SECOND])

    bundle = world.catalogue.bundle().signed(safe, now=START).signed({new.public_key.key_id: new}, now=START)
    await world.catalogue.publish_signed(bundle)

    assert await client.finds(FIRST)
    assert await client.finds(SECOND)


async def test_keys_that_come_back_publish_what_waited_with_the_next_change(
    world: SignedWorld, client: TufClient
) -> None:
    elsewhere = world.move_keys(KeyRole.TARGETS)
    await world.catalogue.release([FIRST])
    (elsewhere / "targets").rename(world.folder / "keys" / "targets")

    await world.catalogue.release([FIRST])

    assert await client.finds(FIRST)


async def test_keys_that_come_back_publish_what_waited_at_the_next_look(world: SignedWorld, client: TufClient) -> None:
    elsewhere = world.move_keys(KeyRole.TARGETS)
    await world.catalogue.release([FIRST])
    (elsewhere / "targets").rename(world.folder / "keys" / "targets")

    await world.catalogue.renew()

    assert await client.finds(FIRST)


async def test_a_draft_that_waits_for_long_is_drafted_anew_before_it_expires(
    world: SignedWorld, client: TufClient, safe: Mapping[str, Signer]
) -> None:
    await world.catalogue.release([FIRST])
    for _ in range(100):
        world.clock.advance(days=1)
        await world.catalogue.renew()

    await world.catalogue.publish_signed(world.catalogue.bundle().signed(safe, now=world.clock.now()))

    assert await client.finds(FIRST)


@pytest.mark.parametrize("role", [KeyRole.DIRECTOR, KeyRole.SNAPSHOT, KeyRole.TIMESTAMP])
async def test_a_key_that_signs_online_and_is_elsewhere_is_refused(world: SignedWorld, role: KeyRole) -> None:
    with pytest.raises(InvalidRequest, match="signs online"):
        await world.catalogue.rotate(role, public_key=PrivateKey.generate().public_key)


async def test_a_draft_that_expired_while_it_waited_is_refused(world: SignedWorld, safe: Mapping[str, Signer]) -> None:
    await world.catalogue.release([FIRST])
    bundle = world.catalogue.bundle().signed(safe, now=START)
    world.clock.advance(days=91)

    with pytest.raises(Untrusted, match="expired"):
        await world.catalogue.publish_signed(bundle)


async def test_who_signs_reads_what_changes(world: SignedWorld) -> None:
    await world.catalogue.release([FIRST, SECOND])
    world.move_keys(KeyRole.ROOT, KeyRole.TARGETS)
    await world.catalogue.revoke(METER, versions=[1])
    rotation = await world.catalogue.rotate(KeyRole.DIRECTOR)

    assert carried(world.catalogue.bundle()).changes() == [
        "family-meter: version 2, expires 2030-05-30",
        f"  - {FIRST.path}",
        "  floor 2",
        "targets: version 3, expires 2030-05-30",
        f"  + director key {rotation.added}",
        f"  - director key {rotation.removed}",
    ]


async def test_keys_that_no_role_asks_for_are_refused(world: SignedWorld, safe: Mapping[str, Signer]) -> None:
    await world.catalogue.release([FIRST])
    stranger = PrivateKey.generate()

    with pytest.raises(InvalidRequest, match="expected one of the keys"):
        world.catalogue.bundle().signed({stranger.public_key.key_id: stranger}, now=START)


async def test_a_changed_draft_is_not_what_was_staged(world: SignedWorld, safe: Mapping[str, Signer]) -> None:
    await world.catalogue.release([FIRST])
    bundle = world.catalogue.bundle()
    changed = orjson.loads(bundle.staged["family-meter"])
    changed["signed"]["x-nanofleet-release-floor"] = 0
    forged = replace(bundle, staged={**bundle.staged, "family-meter": orjson.dumps(changed)})

    with pytest.raises(Conflict, match="not what is staged"):
        await world.catalogue.publish_signed(forged.signed(safe, now=START))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"format":"nanofleet staged metadata 1"}',
        b'{"format":"nanofleet staged metadata 1","current":{},"staged":[]}',
    ],
)
def test_a_file_that_is_no_bundle_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidRequest, match="bundle"):
        Bundle.from_bytes(content)


def test_a_bundle_is_bounded() -> None:
    with pytest.raises(TooLarge):
        Bundle.from_bytes(b" " * (MAX_BUNDLE_BYTES + 1))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=6),
    max_leaves=20,
)


@given(current=_JSON, staged=_JSON)
def test_whatever_stands_in_a_bundle_is_read_or_refused(current: object, staged: object) -> None:
    content = orjson.dumps({"format": FORMAT, "current": current, "staged": staged})

    with suppress(InvalidRequest):
        bundle = Bundle.from_bytes(content)
        bundle.changes()
        bundle.signed({}, now=START)


@pytest.mark.parametrize("staged", [b'"targets"', b'{"signed":{"_type":"targets"},"signatures":[]}', b"{}"])
async def test_a_bundle_with_malformed_metadata_is_refused(world: SignedWorld, staged: bytes) -> None:
    current = {"root": world.catalogue.export_root()}
    bundle = carried(Bundle(current, {"targets": staged}))

    with pytest.raises(InvalidRequest):
        bundle.metadata()
    with pytest.raises(InvalidRequest):
        bundle.signed({}, now=START)
