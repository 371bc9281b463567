"""The catalogue as agents meet it: every claim is checked by python-tuf's own client over what the service serves."""

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuf.api.exceptions import ExpiredMetadataError

from controller.signing.edition import NO_EDITION, AnyMetadata, floor_of, parse_metadata, revoked_of
from controller.signing.keys import EnvironmentKeys, KeyFiles, KeyRing, PrivateKey
from controller.signing.model import KEY_COUNTS, KeyRole, PublicKey
from controller.signing.revision import Revision
from controller.signing.service import Catalogue
from core.catalogue import ISSUED, MAX_FAMILIES, family_role
from core.errors import Conflict, InvalidRequest, NotFound, Unavailable, Untrusted
from core.fleet_state import NO_CATALOGUE, CatalogueVersions
from core.fleet_wire import MAX_METADATA_FILES
from core.ids import ModelName
from tests.support.catalogues import CAT, METER, START, SignedWorld, TufClient, made_release

FIRST = made_release(METER, 1)
SECOND = made_release(METER, 2)
THIRD = made_release(METER, 3)
OFFLINE = (KeyRole.ROOT, KeyRole.TARGETS)


@pytest.fixture
async def world(tmp_path: Path) -> SignedWorld:
    world = SignedWorld(tmp_path / "controller")
    await world.catalogue.prepare()
    return world


@pytest.fixture
async def client(world: SignedWorld, tmp_path: Path) -> TufClient:
    return TufClient(world, tmp_path / "client")


async def family(catalogue: Catalogue, version: int) -> AnyMetadata:
    return parsed(await catalogue.metadata(f"{version}.{family_role(METER)}.json"))


def parsed(content: bytes) -> AnyMetadata:
    return parse_metadata(content, where="test")


# ---- first start ----------------------------------------------------------------------------------------------


async def test_the_first_start_makes_keys_that_only_their_owner_reads(world: SignedWorld) -> None:
    files = sorted((world.folder / "keys").rglob("*.pem"))

    assert len(files) == sum(KEY_COUNTS.values())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert {stat.S_IMODE(file.parent.stat().st_mode) for file in files} == {0o700}


async def test_a_new_catalogue_verifies_and_lists_nothing(client: TufClient) -> None:
    assert not await client.finds(FIRST)


async def test_a_second_start_keeps_catalogue_and_keys(world: SignedWorld) -> None:
    again = world.restarted()

    await again.prepare()

    assert again.export_root() == world.catalogue.export_root()
    assert again.versions() == CatalogueVersions(1, 1)


async def test_a_crash_before_the_first_publish_leaves_keys_that_the_next_start_uses(tmp_path: Path) -> None:
    world = SignedWorld(tmp_path)
    world.memory.fail_next = Unavailable("the disk is full")
    with pytest.raises(Unavailable):
        await world.catalogue.prepare()

    await world.restarted().prepare()

    assert len(list((tmp_path / "keys").rglob("*.pem"))) == sum(KEY_COUNTS.values())


async def test_keys_from_the_environment_are_used_and_none_made_beside_them(tmp_path: Path) -> None:
    key = PrivateKey.generate()
    source = EnvironmentKeys({"NANOFLEET_SIGNING_KEY_TARGETS": key.to_pem().decode(), "HOME": "/"})
    world = SignedWorld(tmp_path)
    world.keys = KeyRing(KeyFiles(tmp_path / "keys"), source)
    catalogue = world.restarted()

    await catalogue.prepare()

    targets = next(role for role in (await catalogue.status()).roles if role.role == "targets")
    assert targets.key_ids == targets.present == (key.public_key.key_id,)
    assert not (tmp_path / "keys" / "targets").exists()


def test_a_key_that_is_none_is_refused_with_its_place() -> None:
    source = EnvironmentKeys({"NANOFLEET_SIGNING_KEY_ROOT_2": "not a key"})

    with pytest.raises(InvalidRequest, match="NANOFLEET_SIGNING_KEY_ROOT_2"):
        source.signers(KeyRole.ROOT)


# ---- releases -------------------------------------------------------------------------------------------------


async def test_a_released_variant_is_a_target_with_the_digest_of_its_manifest(
    world: SignedWorld, client: TufClient
) -> None:
    await world.catalogue.release([FIRST])

    assert await client.finds(FIRST)
    assert not await client.finds(made_release(METER, 1, content=b"other"))
    assert world.catalogue.is_released(FIRST.manifest_digest)


async def test_releasing_again_changes_nothing(world: SignedWorld) -> None:
    await world.catalogue.release([FIRST])
    before = world.catalogue.versions()

    await world.catalogue.release([FIRST])

    assert world.catalogue.versions() == before


async def test_a_listed_variant_never_changes_its_bytes(world: SignedWorld) -> None:
    await world.catalogue.release([FIRST])

    with pytest.raises(Conflict, match="publish a new version"):
        await world.catalogue.release([made_release(METER, 1, content=b"other")])


async def test_a_variant_without_a_counter_is_never_released(world: SignedWorld) -> None:
    uncounted = made_release(is_counted=False)

    await world.catalogue.release([uncounted])

    with pytest.raises(Conflict, match="published before signing"):
        world.catalogue.require_released(uncounted.slot)


async def test_a_family_may_sign_only_its_own_models_paths(world: SignedWorld, client: TufClient) -> None:
    await world.catalogue.release([FIRST, made_release(CAT)])

    targets = parsed(await world.catalogue.metadata("2.targets.json")).signed
    role = targets.delegations.roles["family-meter"]
    assert (role.paths, role.terminating, role.threshold) == (["meter/*/*.json"], True, 1)
    assert await client.finds(made_release(CAT))


def test_there_are_at_most_so_many_families() -> None:
    revision = begun()
    revision.release([made_release(ModelName(f"m{number}")) for number in range(MAX_FAMILIES)])

    with pytest.raises(Conflict, match="at most 200"):
        revision.release([made_release(METER)])


async def test_offline_roles_say_when_they_were_issued(world: SignedWorld) -> None:
    await world.catalogue.release([FIRST])

    issued = (await family(world.catalogue, 1)).signed.unrecognized_fields[ISSUED]

    assert issued == f"{START:%Y-%m-%dT%H:%M:%SZ}"


async def test_a_publish_whose_end_was_not_seen_is_found_again(world: SignedWorld, client: TufClient) -> None:
    world.memory.lose_next = Unavailable("the connection broke")
    with pytest.raises(Unavailable):
        await world.catalogue.release([FIRST])

    await world.catalogue.release([FIRST, SECOND])

    assert await client.finds(FIRST)
    assert await client.finds(SECOND)


# ---- revocation -----------------------------------------------------------------------------------------------


async def test_a_revoked_version_is_no_target_and_below_the_floor(world: SignedWorld, client: TufClient) -> None:
    await world.catalogue.release([FIRST, SECOND])

    assert await world.catalogue.revoke(METER, versions=[1])

    assert not await client.finds(FIRST)
    assert await client.finds(SECOND)
    assert floor_of((await family(world.catalogue, 2)).signed) == 2


async def test_a_version_revoked_between_others_leaves_them_installable(world: SignedWorld, client: TufClient) -> None:
    await world.catalogue.release([FIRST, SECOND, THIRD])

    await world.catalogue.revoke(METER, versions=[2])

    signed = (await family(world.catalogue, 2)).signed
    assert (floor_of(signed), revoked_of(signed)) == (1, (2,))
    assert [await client.finds(each) for each in (FIRST, SECOND, THIRD)] == [True, False, True]


async def test_everything_below_a_version_can_be_revoked(world: SignedWorld, client: TufClient) -> None:
    await world.catalogue.release([FIRST, SECOND, THIRD])

    await world.catalogue.revoke(METER, below=3)

    assert [await client.finds(each) for each in (FIRST, SECOND, THIRD)] == [False, False, True]
    assert floor_of((await family(world.catalogue, 2)).signed) == 3


async def test_what_was_revoked_is_never_released_again(world: SignedWorld) -> None:
    await world.catalogue.release([FIRST, SECOND, THIRD])
    await world.catalogue.revoke(METER, versions=[1, 3])

    await world.catalogue.release([FIRST, SECOND, THIRD])

    listed = [world.catalogue.is_released(each.manifest_digest) for each in (FIRST, SECOND, THIRD)]
    assert listed == [False, True, False]


async def test_a_revoked_version_cannot_be_deployed(world: SignedWorld) -> None:
    await world.catalogue.release([FIRST])
    await world.catalogue.revoke(METER, versions=[1])

    with pytest.raises(Conflict, match="revoked"):
        world.catalogue.require_released(FIRST.slot)


async def test_a_version_that_is_not_listed_cannot_be_revoked(world: SignedWorld) -> None:
    await world.catalogue.release([FIRST])

    with pytest.raises(InvalidRequest, match=r"expected versions of \[1\]"):
        await world.catalogue.revoke(METER, versions=[7])
    with pytest.raises(NotFound):
        await world.catalogue.revoke(CAT, below=2)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=12))
def test_the_floor_only_grows_and_no_listed_version_is_below_it(steps: list[tuple[bool, int]]) -> None:
    revision, floor = begun(), 1
    revision.release([made_release(METER, version) for version in range(1, 7)])
    for is_below, version in steps:
        listed = listed_in(revision)
        if is_below:
            revision.revoke_below(METER, version)
        elif version in listed:
            revision.revoke(METER, versions=[version])
        revision.release([made_release(METER, version) for version in range(1, 7)])
        signed = parsed(revision.drafts[family_role(METER)]).signed
        assert floor_of(signed) >= floor
        assert min(listed_in(revision), default=floor_of(signed)) >= floor_of(signed)
        assert listed_in(revision) <= listed
        floor = floor_of(signed)


# ---- expiry ---------------------------------------------------------------------------------------------------


async def test_metadata_that_nobody_renews_expires(world: SignedWorld, client: TufClient) -> None:
    await world.catalogue.release([FIRST])
    world.clock.advance(days=7, seconds=1)

    with pytest.raises(ExpiredMetadataError):
        await client.finds(FIRST)


async def test_what_has_a_third_of_its_life_left_is_renewed(world: SignedWorld, client: TufClient) -> None:
    await world.catalogue.release([FIRST])
    for _ in range(200):
        world.clock.advance(days=2)
        await world.catalogue.renew()

    assert await client.finds(FIRST)
    assert world.catalogue.versions().root == 2


async def test_nothing_is_renewed_before_its_time(world: SignedWorld) -> None:
    world.clock.advance(days=4)

    await world.catalogue.renew()

    assert world.catalogue.versions() == CatalogueVersions(1, 1)


async def test_a_start_after_a_long_stop_renews_at_once(world: SignedWorld, client: TufClient) -> None:
    await world.catalogue.release([FIRST])
    world.clock.advance(days=80)
    world.catalogue = world.restarted()

    await world.catalogue.prepare()

    assert await client.finds(FIRST)


async def test_roles_with_keys_elsewhere_are_staged_and_alarmed_in_time(
    world: SignedWorld, caplog: pytest.LogCaptureFixture
) -> None:
    await world.catalogue.release([FIRST])
    world.move_keys(*OFFLINE)
    world.clock.advance(days=61)

    await world.catalogue.renew()
    await world.catalogue.renew()

    assert set(world.catalogue.bundle().staged) == {"targets", "family-meter"}
    assert [record.levelname for record in caplog.records if "expires" in record.message] == ["WARNING", "WARNING"]
    caplog.clear()
    world.clock.advance(days=24)
    await world.catalogue.renew()
    assert [record.levelname for record in caplog.records if "expires" in record.message] == ["ERROR", "ERROR"]


# ---- rotation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [KeyRole.ROOT, KeyRole.TARGETS, KeyRole.SNAPSHOT, KeyRole.TIMESTAMP])
async def test_a_client_follows_the_rotation_of_a_key(world: SignedWorld, client: TufClient, role: KeyRole) -> None:
    await world.catalogue.release([FIRST])
    assert await client.finds(FIRST)

    rotation = await world.catalogue.rotate(role)
    await world.catalogue.release([SECOND])

    assert rotation.is_published
    of_role = next(each for each in (await world.catalogue.status()).roles if each.role == role)
    assert rotation.added in of_role.key_ids
    assert rotation.removed not in of_role.key_ids
    assert await client.finds(FIRST)
    assert await client.finds(SECOND)


async def test_a_client_that_was_away_for_many_rotations_follows_the_chain(
    world: SignedWorld, client: TufClient
) -> None:
    for role in [KeyRole.ROOT, KeyRole.TARGETS] * 5:
        await world.catalogue.rotate(role)
    await world.catalogue.release([FIRST])

    assert world.catalogue.versions().root == 11
    assert await client.finds(FIRST)


async def test_a_named_key_is_replaced_by_one_that_is_kept_elsewhere(world: SignedWorld) -> None:
    old = (await world.catalogue.status()).roles[0].key_ids
    new = PrivateKey.generate().public_key

    rotation = await world.catalogue.rotate(KeyRole.ROOT, replaces=old[1][:12], public_key=new)

    assert (rotation.removed, rotation.added) == (old[1], new.key_id)
    root = (await world.catalogue.status()).roles[0]
    assert set(root.key_ids) == {old[0], old[2], new.key_id}
    assert new.key_id not in root.present


async def test_a_key_that_a_role_does_not_have_cannot_be_replaced(world: SignedWorld) -> None:
    with pytest.raises(NotFound, match="it has"):
        await world.catalogue.rotate(KeyRole.ROOT, replaces="ffff-none")


async def test_online_keys_that_are_gone_are_missed_by_name(world: SignedWorld) -> None:
    world.move_keys(KeyRole.SNAPSHOT)

    with pytest.raises(Unavailable, match="snapshot keys"):
        await world.catalogue.release([FIRST])


# ---- what agents are sent -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "",
        "root.json",
        "1.timestamp.json",
        "0.root.json",
        "2.root.json",
        "../1.root.json",
        "1.family-%.json",
        "1.nobody.json",
    ],
)
async def test_a_name_that_is_no_file_is_not_found(world: SignedWorld, name: str) -> None:
    with pytest.raises(NotFound):
        await world.catalogue.metadata(name)


async def test_a_machine_without_metadata_is_sent_all_that_it_needs(world: SignedWorld) -> None:
    await world.catalogue.release([FIRST, made_release(CAT)])
    await world.catalogue.rotate(KeyRole.TIMESTAMP)

    files = await world.catalogue.newer_than(NO_CATALOGUE, [METER])

    names = [file.name for file in files]
    assert names == [
        "1.root.json",
        "2.root.json",
        "timestamp.json",
        "3.snapshot.json",
        "2.targets.json",
        "1.family-meter.json",
    ]


async def test_a_machine_that_is_up_to_date_is_sent_only_families(world: SignedWorld) -> None:
    await world.catalogue.release([FIRST])

    files = await world.catalogue.newer_than(world.catalogue.versions(), [METER])

    assert [file.name for file in files] == ["1.family-meter.json"]


async def test_no_more_files_are_sent_than_a_message_holds(world: SignedWorld) -> None:
    for _ in range(MAX_METADATA_FILES):
        await world.catalogue.rotate(KeyRole.TIMESTAMP)

    files = await world.catalogue.newer_than(NO_CATALOGUE, [])

    assert len(files) == MAX_METADATA_FILES


# ---- values ---------------------------------------------------------------------------------------------------


def begun() -> Revision:
    revision = Revision(NO_EDITION, {}, now=START)
    revision.begin({role: [PrivateKey.generate().public_key for _ in range(n)] for role, n in KEY_COUNTS.items()})
    return revision


def listed_in(revision: Revision) -> set[int]:
    targets = parsed(revision.drafts[family_role(METER)]).signed.targets
    return {int(path.split("/")[1]) for path in targets}


def test_an_unsigned_revision_settles_nothing() -> None:
    revision = begun()

    settled = revision.settled()

    assert settled.files == ()
    assert set(settled.waiting) == {"root", "targets"}


def test_two_of_three_root_keys_are_enough_and_one_is_not() -> None:
    keys = {role: [PrivateKey.generate() for _ in range(n)] for role, n in KEY_COUNTS.items()}
    one, two, targets = *keys[KeyRole.ROOT][:2], keys[KeyRole.TARGETS][0]
    revision = Revision(NO_EDITION, {}, now=START)
    revision.begin({role: [key.public_key for key in of_role] for role, of_role in keys.items()})

    revision.sign({key.public_key.key_id: key for key in (one, targets)})
    assert revision.settled().files == ()
    revision.sign({two.public_key.key_id: two})

    assert {file.role for file in revision.settled().files} == {"root", "targets"}


@pytest.mark.parametrize("text", ["", "zz" * 32, "ab" * 31])
def test_a_malformed_public_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="64 hexadecimal digits"):
        PublicKey.from_hex(text)


# ---- key files that are none ------------------------------------------------------------------------------------


async def test_a_stray_file_among_the_keys_is_skipped_and_named(
    world: SignedWorld, client: TufClient, caplog: pytest.LogCaptureFixture
) -> None:
    stray = world.folder / "keys" / KeyRole.TARGETS / "notes.pem"
    stray.write_text("not a key")
    stray.chmod(0o600)

    await world.catalogue.release([FIRST])
    await world.catalogue.release([SECOND])

    assert await client.finds(SECOND)
    assert [getattr(record, "path", "") for record in caplog.records if record.message.startswith("skipped")] == [
        str(stray)
    ]


async def test_a_key_file_that_others_may_read_is_refused(world: SignedWorld) -> None:
    exposed = min((world.folder / "keys" / KeyRole.TARGETS).glob("*.pem"))
    exposed.chmod(0o640)

    with pytest.raises(Untrusted, match=f"chmod 600 {exposed}"):
        await world.catalogue.release([FIRST])
