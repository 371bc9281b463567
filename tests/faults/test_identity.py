"""I01 to I12: who gets into the fleet and who does not, over real TLS; the ids are those of the table of faults."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.verification import PolicyBuilder, Store

from controller.api.enrolment_grpc import ENROL_ADDRESS_RATE, MAX_REQUEST_BYTES
from controller.api.policy import MAX_CALLS
from controller.identity.authority import CertificateAuthority, key_pem, new_key, public_key_of
from controller.identity.model import AUTHORITY_OVERLAP, AuthorityState
from controller.identity.renewal import NONCE_BYTES
from core.addresses import Address
from core.fleet_state import NOWHERE
from core.fleet_wire import encode_hello
from core.grpc_transport import MUTUAL_TLS_OPTIONS, TlsIdentity, open_channel
from core.ids import AgentId, SiteId
from core.spiffe import CONTROLLER_DNS_NAME, Peer, Role
from protos.artifacts.v1 import artifacts_pb2
from protos.artifacts.v1.artifacts_pb2_grpc import ArtifactServiceStub
from protos.fleet.v1 import fleet_pb2
from protos.fleet.v1.fleet_pb2_grpc import FleetServiceStub
from protos.identity.v1 import identity_pb2 as pb
from protos.inference.v2 import open_inference_pb2
from protos.inference.v2.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.support.fake_agent import Dialler
from tests.support.fleet_values import made_hello
from tests.support.trusted_controller import DOMAIN, ROOT, TIMEOUT_S, TrustedController, made_csr, trusted_controller

CAM = AgentId("cam-1")
DAY = timedelta(days=1)
# What the files that a test may have open allow; more than what stopped all enrolment once.
SILENT_CONNECTIONS = 1_500
Code = grpc.StatusCode


@pytest.fixture
async def controller(tmp_path: Path) -> AsyncIterator[TrustedController]:
    async with trusted_controller(tmp_path) as made:
        yield made


@pytest.fixture
async def hasty(tmp_path: Path) -> AsyncIterator[TrustedController]:
    """A controller that soon gives up on a peer that says nothing."""
    async with trusted_controller(tmp_path, patience_s=0.2) as made:
        yield made


async def refused_enrolment(controller: TrustedController, request: pb.EnrolRequest) -> grpc.aio.AioRpcError:
    async with controller.enrolment_stub() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stub.Enrol(request, timeout=TIMEOUT_S)
    return refusal.value


async def refused_secret(controller: TrustedController, secret: bytes, wanted_id: str = "") -> tuple[Code, str | None]:
    request = pb.EnrolRequest(secret=secret, csr=made_csr(new_key()), wanted_id=wanted_id)
    refusal = await refused_enrolment(controller, request)
    return refusal.code(), refusal.details()


async def sent(channel: grpc.aio.Channel, method: str, content: bytes = b"", *, timeout_s: float = TIMEOUT_S) -> bytes:
    """Send bytes as they are; return those of the answer."""
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
    return await call(content, timeout=timeout_s)


# ---- tokens ---------------------------------------------------------------------------------------------------


async def test_a_token_makes_an_identity_that_the_main_port_accepts(controller: TrustedController) -> None:
    device = await controller.enrolled()

    assert (device.name, device.credential.site, device.credential.catalogue_root) == (CAM, "north", ROOT)
    assert await controller.is_served(device)


async def test_I01_a_used_an_expired_and_an_unknown_token_are_refused_alike(controller: TrustedController) -> None:
    used = await controller.token()
    await controller.enrol(used)
    expired = await controller.token(lifetime=timedelta(minutes=1))
    controller.clock.shift(timedelta(minutes=2))

    answers = {await refused_secret(controller, secret) for secret in (used, expired, bytes(32), b"", b"x" * 500)}

    assert len(answers) == 1
    code, details = answers.pop()
    assert code is Code.PERMISSION_DENIED
    assert "unknown, used, expired or of another controller" in (details or "")


async def test_I01_a_banned_agent_is_not_let_in_by_a_token_that_does_not_name_it(controller: TrustedController) -> None:
    device = await controller.enrolled()
    await controller.identity.ban(CAM, reason="lost")

    other = await controller.enrol(await controller.token(), wanted_id=CAM)

    assert other.name != CAM
    assert (await controller.refusal(device))[0] is Code.PERMISSION_DENIED


async def test_I01_a_lost_reply_is_asked_for_again_with_the_same_key(controller: TrustedController) -> None:
    secret, key = await controller.token(), new_key()
    first = await controller.enrol(secret, key=key)

    again = await controller.enrol(secret, key=key)

    assert again.name == first.name
    assert await controller.is_served(again)


async def test_I01_a_token_that_names_a_root_of_another_fleet_is_not_used_up(controller: TrustedController) -> None:
    secret = await controller.token()

    refusal = await refused_enrolment(
        controller, pb.EnrolRequest(secret=secret, csr=made_csr(new_key()), root_sha256=bytes(32))
    )

    assert refusal.code() is Code.NOT_FOUND
    assert await controller.is_served(await controller.enrol(secret))


async def test_I02_of_two_that_race_with_one_token_one_gets_in(controller: TrustedController) -> None:
    secret = await controller.token()

    results = await asyncio.gather(*(controller.enrol(secret) for _ in range(5)), return_exceptions=True)

    refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert [result.code() for result in refused] == [Code.PERMISSION_DENIED] * 4
    assert len(await controller.identity.identities()) == 1


async def test_I02_a_stolen_token_does_not_take_the_name_of_a_device(controller: TrustedController) -> None:
    device = await controller.enrolled()

    thief = await controller.enrol(await controller.token(), wanted_id=CAM)

    assert thief.name != CAM
    assert await controller.is_served(device)


# ---- duplicates -----------------------------------------------------------------------------------------------


async def test_I03_two_live_clones_are_both_refused_and_alarmed(
    controller: TrustedController, caplog: pytest.LogCaptureFixture
) -> None:
    device = await controller.enrolled()
    clone = device.cloned()
    async with controller.dial(device) as agent, controller.dial(clone) as other:
        await agent.hello(device.hello(boot_id="a"))
        await other.hello(clone.hello(boot_id="b"))
        assert (await agent.end())[0] is Code.ABORTED

        code, reason = await controller.refusal(device, hello=device.hello(boot_id="a"))

        assert (code, "two machines" in reason) == (Code.PERMISSION_DENIED, True)
        assert (await other.end())[0] is Code.PERMISSION_DENIED
    assert (await controller.refusal(clone, hello=clone.hello(boot_id="b")))[0] is Code.PERMISSION_DENIED
    assert [record.levelno for record in caplog.records if "two machines" in record.message] == [logging.ERROR]


async def test_I03_a_restart_replaces_a_stream_that_is_not_known_to_be_dead(controller: TrustedController) -> None:
    device = await controller.enrolled()
    async with controller.dial(device) as dead:
        await dead.hello(device.hello(boot_id="a"))

        assert await controller.is_served(device, boot_id="b")
        assert await controller.is_served(device, boot_id="b")


async def test_I03_a_clone_is_locked_out_when_the_name_is_enrolled_anew(controller: TrustedController) -> None:
    device = await controller.enrolled()
    clone = device.cloned()
    async with controller.dial(clone) as stream:
        await stream.hello(clone.hello())

        anew = await controller.enrolled()

        assert (await stream.end())[0] is Code.PERMISSION_DENIED
    assert (await controller.refusal(clone))[0] is Code.PERMISSION_DENIED
    assert await controller.is_served(anew)


# ---- certificate requests -------------------------------------------------------------------------------------


def rsa_csr() -> bytes:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def forged_csr() -> bytes:
    """Return a request whose signature was broken."""
    csr = bytearray(made_csr(new_key()))
    csr[-1] ^= 1
    return bytes(csr)


@pytest.mark.parametrize(
    "csr",
    [b"", b"\x30\x80", b"\x00" * 5000, rsa_csr(), made_csr(ec.generate_private_key(ec.SECP384R1())), forged_csr()],
    ids=["missing", "garbage", "oversize", "rsa", "p384", "forged"],
)
async def test_I04_a_bad_request_is_refused_and_leaves_the_token_good(
    controller: TrustedController, csr: bytes
) -> None:
    secret = await controller.token()

    refusal = await refused_enrolment(controller, pb.EnrolRequest(secret=secret, csr=csr))

    assert refusal.code() is Code.INVALID_ARGUMENT
    assert await controller.is_served(await controller.enrol(secret))


async def test_I04_names_in_a_request_are_not_certified(controller: TrustedController) -> None:
    key = new_key()
    greedy = made_csr(
        key,
        x509.UniformResourceIdentifier(f"spiffe://{DOMAIN}/controller/main"),
        x509.DNSName(CONTROLLER_DNS_NAME),
    )
    async with controller.enrolment_stub() as stub:
        credential = await stub.Enrol(pb.EnrolRequest(secret=await controller.token(CAM), csr=greedy))

    certificate = x509.load_pem_x509_certificate(credential.certificate_chain)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [
        x509.UniformResourceIdentifier(f"spiffe://{DOMAIN}/agent/{CAM}"),
        x509.DNSName(f"{CAM}.agents.nanofleet.internal"),
    ]


async def test_I04_an_agent_cannot_serve_as_the_controller(controller: TrustedController) -> None:
    device = await controller.enrolled()
    impostor = grpc.aio.server()
    port = impostor.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials([(device.tls.private_key, device.tls.certificate_chain)])
    )
    await impostor.start()

    async with open_channel(Address("127.0.0.1", port), device.tls) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await GRPCInferenceServiceStub(channel).ServerLive(open_inference_pb2.ServerLiveRequest(), timeout=2)

    assert refusal.value.code() is Code.UNAVAILABLE
    await impostor.stop(None)


# ---- bans -----------------------------------------------------------------------------------------------------


async def test_I05_a_banned_agent_is_kicked_and_refused_until_it_enrols_anew(controller: TrustedController) -> None:
    device = await controller.enrolled()
    async with controller.dial(device) as agent:
        await agent.hello(device.hello())
        await controller.identity.ban(CAM, reason="stolen")
        code, reason = await agent.end()
    assert (code, "stolen" in reason) == (Code.PERMISSION_DENIED, True)
    assert (await controller.refusal(device))[0] is Code.PERMISSION_DENIED
    with pytest.raises(grpc.aio.AioRpcError, match="stolen"):
        await controller.renew(device)

    anew = await controller.enrolled()

    assert await controller.is_served(anew)
    assert (await controller.refusal(device))[0] is Code.PERMISSION_DENIED


async def test_I05_a_stream_opened_before_the_ban_cannot_say_hello_after_it(controller: TrustedController) -> None:
    device = await controller.enrolled()
    machine = Dialler(controller.main_address, device.tls)
    # On one connection, in this order: the spare stream is admitted before the other is welcomed.
    async with machine.dial() as spare, machine.dial() as agent:
        await agent.hello(device.hello())
        await controller.identity.ban(CAM, reason="stolen")
        assert (await agent.end())[0] is Code.PERMISSION_DENIED

        await spare.say(fleet_pb2.AgentMessage(hello=encode_hello(device.hello())))

        code, reason = await spare.end()
    assert (code, "stolen" in reason) == (Code.PERMISSION_DENIED, True)
    assert controller.fleet.session_count == 0
    await machine.close()


async def test_I05_a_ban_is_known_after_a_restart(controller: TrustedController) -> None:
    device = await controller.enrolled()
    await controller.identity.ban(CAM, reason="stolen")

    await controller.identity.prepare()

    assert (await controller.refusal(device))[0] is Code.PERMISSION_DENIED


async def test_I05_the_key_of_a_banned_agent_cannot_be_enrolled_again(controller: TrustedController) -> None:
    device = await controller.enrolled()
    await controller.identity.ban(CAM, reason="stolen")

    with pytest.raises(grpc.aio.AioRpcError, match="make a new one"):
        await controller.enrol(await controller.token(CAM), key=device.key)


# ---- rotation -------------------------------------------------------------------------------------------------


async def test_I06_an_authority_is_rotated_without_any_agent_noticing(controller: TrustedController) -> None:
    old = await controller.enrolled("old")

    await controller.identity.rotate()
    assert await controller.is_served(old)
    await controller.identity.rotate()
    new = await controller.enrolled("new")

    # The old one trusts the old authority only, the new one is certified by the new.
    assert await controller.is_served(old)
    assert await controller.is_served(new)
    assert await controller.is_served(await controller.renew(old))


async def test_I06_an_agent_hears_of_the_next_authority_when_it_says_hello(controller: TrustedController) -> None:
    device = await controller.enrolled()
    await controller.identity.rotate()

    async with controller.dial(device) as agent:
        known = hashlib.sha256(device.credential.trust_bundle).digest()
        hello = replace(device.hello(), trust_bundle_sha256=known)
        assert await agent.hello(hello) == NOWHERE

        assert (await agent.hear()).trust_bundle.pem == controller.identity.trust_bundle()


async def test_I06_a_retired_authority_is_dropped_when_all_it_signed_is_over(controller: TrustedController) -> None:
    device = await controller.enrolled()
    await controller.identity.rotate()
    await controller.identity.rotate()
    controller.clock.shift(AUTHORITY_OVERLAP - DAY)
    await controller.identity.tidy()
    assert len(controller.identity.authorities()) == 2

    controller.clock.shift(AUTHORITY_OVERLAP + DAY)
    await controller.identity.tidy()

    assert [each.state for each in controller.identity.authorities()] == [AuthorityState.ACTIVE]
    # Neither side trusts the other any more.
    assert (await controller.refusal(device))[0] is Code.UNAVAILABLE


# ---- renewal --------------------------------------------------------------------------------------------------


async def test_I07_an_agent_whose_certificate_expired_offline_renews_by_its_key(controller: TrustedController) -> None:
    controller.clock.shift(-8 * DAY)
    device = await controller.enrolled()
    controller.clock.shift(timedelta())
    assert (await controller.refusal(device))[0] is Code.UNAVAILABLE

    renewed = await controller.renew(device)

    assert await controller.is_served(renewed)


async def test_I07_too_long_after_the_expiry_a_new_token_is_needed(controller: TrustedController) -> None:
    device = await controller.enrolled()
    controller.clock.shift(98 * DAY)

    with pytest.raises(grpc.aio.AioRpcError, match="more than 90 days") as refusal:
        await controller.renew(device)

    assert refusal.value.code() is Code.PERMISSION_DENIED


async def test_I07_the_key_before_counts_until_the_new_one_is_seen(controller: TrustedController) -> None:
    device = await controller.enrolled()
    lost_key = new_key()
    await controller.renew(device, key=lost_key)
    assert await controller.is_served(device)

    renewed = await controller.renew(device, key=lost_key)

    assert await controller.is_served(device)
    assert await controller.is_served(renewed)
    await controller.identity.tidy()
    assert (await controller.refusal(device))[0] is Code.PERMISSION_DENIED
    with pytest.raises(grpc.aio.AioRpcError, match="not signed by the key"):
        await controller.renew(device)


async def test_I07_a_renewal_needs_a_new_key(controller: TrustedController) -> None:
    device = await controller.enrolled()

    with pytest.raises(grpc.aio.AioRpcError, match="each renewal needs a new one"):
        await controller.renew(device, key=device.key)


# ---- floods, hostile content and slow peers -------------------------------------------------------------------


async def test_I08_a_flood_of_enrolments_starves_neither_renewals_nor_the_main_port(
    controller: TrustedController,
) -> None:
    device = await controller.enrolled()
    request = pb.EnrolRequest(secret=bytes(32), csr=made_csr(new_key()))
    flood = 3 * ENROL_ADDRESS_RATE.burst
    async with controller.enrolment_stub() as stub:

        async def attempt() -> Code:
            try:
                await stub.Enrol(request, timeout=TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                return error.code()
            return Code.OK

        codes = await asyncio.gather(*(attempt() for _ in range(flood)))
        # Beyond its share an address is refused by its rate, and one connection by its number of calls at a time.
        assert set(codes) <= {Code.PERMISSION_DENIED, Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE}
        assert codes.count(Code.PERMISSION_DENIED) < flood // 2

        renewed = await controller.renew(device)

    assert await controller.is_served(renewed)


@pytest.mark.parametrize("name", ["../../etc", "a" * 65, "a/b", "ä", "#", "-x", "a\n"])
async def test_I09_hostile_names_are_refused(controller: TrustedController, name: str) -> None:
    request = pb.EnrolRequest(secret=await controller.token(), csr=made_csr(new_key()), wanted_id=name)
    assert (await refused_enrolment(controller, request)).code() is Code.INVALID_ARGUMENT
    async with controller.enrolment_stub() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stub.Challenge(pb.ChallengeRequest(agent_id=name), timeout=TIMEOUT_S)
    assert refusal.value.code() is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("content", [b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", b"{}"])
async def test_I09_bytes_that_are_no_message_are_refused(controller: TrustedController, content: bytes) -> None:
    credentials = grpc.ssl_channel_credentials(controller.identity.trust_bundle())
    async with grpc.aio.secure_channel(
        str(controller.enrolment.address), credentials, options=MUTUAL_TLS_OPTIONS
    ) as channel:
        for method in ("Enrol", "Challenge", "Renew"):
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await sent(channel, f"/nanofleet.identity.v1.EnrolmentService/{method}", content)
            assert refusal.value.code() is Code.INVALID_ARGUMENT


async def test_I09_a_message_over_the_bound_is_refused(controller: TrustedController) -> None:
    request = pb.EnrolRequest(secret=bytes(32), csr=bytes(MAX_REQUEST_BYTES + 1))

    assert (await refused_enrolment(controller, request)).code() is Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("nonce", [b"", bytes(NONCE_BYTES), bytes(10_000)])
async def test_I09_a_made_up_nonce_is_refused(controller: TrustedController, nonce: bytes) -> None:
    device = await controller.enrolled()
    request = pb.RenewRequest(agent_id=device.name, nonce=nonce, csr=made_csr(new_key()), signature=b"x" * 70)

    async with controller.enrolment_stub() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stub.Renew(request, timeout=TIMEOUT_S)

    assert refusal.value.code() in {Code.PERMISSION_DENIED, Code.INVALID_ARGUMENT}


async def test_I09_a_hello_in_another_name_or_site_is_refused(controller: TrustedController) -> None:
    device = await controller.enrolled()

    for hello in (made_hello(AgentId("cam-2")), made_hello(CAM, site=SiteId("south"))):
        code, reason = await controller.refusal(device, hello=hello)
        assert (code, "hello: expected" in reason) == (Code.PERMISSION_DENIED, True)


async def test_I10_a_role_may_call_its_own_methods_only(controller: TrustedController) -> None:
    device = await controller.enrolled()
    heavy = controller.identity.issue_local(Role.HEAVY, "replica")
    application = controller.identity.issue_local(Role.APPLICATION, "shop")
    fetch = artifacts_pb2.FetchRequest(digest="sha256:" + "0" * 64)
    live = open_inference_pb2.ServerLiveRequest()

    async def fetched(tls: TlsIdentity) -> Code:
        async with controller.channel(tls) as channel:
            call = ArtifactServiceStub(channel).Fetch(fetch, timeout=TIMEOUT_S)
            return await call.code()

    async def asked(tls: TlsIdentity) -> Code:
        async with controller.channel(tls) as channel:
            return await GRPCInferenceServiceStub(channel).ServerLive(live, timeout=TIMEOUT_S).code()

    async def opened(tls: TlsIdentity) -> Code:
        async with controller.channel(tls) as channel:
            return await FleetServiceStub(channel).Session(timeout=TIMEOUT_S).code()

    denied = Code.PERMISSION_DENIED
    assert [await fetched(tls) for tls in (device.tls, heavy, application)] == [denied, Code.NOT_FOUND, denied]
    assert [await asked(tls) for tls in (device.tls, heavy, application)] == [Code.OK, denied, Code.OK]
    assert [await opened(tls) for tls in (heavy, application)] == [denied, denied]


async def test_I10_a_method_that_nobody_registered_is_refused(controller: TrustedController) -> None:
    device = await controller.enrolled()

    async with controller.channel(device.tls) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await sent(channel, "/nanofleet.fleet.v1.FleetService/Shutdown")

    assert refusal.value.code() is Code.UNIMPLEMENTED


async def test_I10_an_agent_of_another_trust_domain_is_refused(controller: TrustedController) -> None:
    device = await controller.enrolled()
    key, signer = new_key(), controller.stolen_authority()
    foreign = signer.issue(
        Peer("other.test", Role.AGENT, CAM), public_key_of(key.public_key()), now=controller.clock.now()
    )
    device.key, device.credential.certificate_chain = key, foreign.pem

    assert (await controller.refusal(device))[0] is Code.PERMISSION_DENIED


async def test_I11_connections_that_say_nothing_are_ended(hasty: TrustedController) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", hasty.enrolment.address.port)
    async with asyncio.timeout(30):
        # Whatever the server says first, it hangs up.
        while await reader.read(1024):
            pass
    writer.close()


async def test_I11_a_thousand_silent_connections_of_one_host_stop_nobody_else(controller: TrustedController) -> None:
    port = controller.enrolment.address.port
    silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(SILENT_CONNECTIONS)]

    assert await controller.is_served(await controller.enrolled())

    for _reader, writer in silent:
        writer.close()


async def test_I11_a_call_without_a_message_is_ended(hasty: TrustedController) -> None:
    credentials = grpc.ssl_channel_credentials(hasty.identity.trust_bundle())
    async with grpc.aio.secure_channel(
        str(hasty.enrolment.address), credentials, options=MUTUAL_TLS_OPTIONS
    ) as channel:
        open_call: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(
            "/nanofleet.identity.v1.EnrolmentService/Enrol"
        )
        call = open_call()
        async with asyncio.timeout(30):
            assert await call.code() is Code.DEADLINE_EXCEEDED


async def test_I11_a_session_without_hello_is_ended(hasty: TrustedController) -> None:
    device = await hasty.enrolled()

    async with hasty.dial(device) as agent:
        assert (await agent.end())[0] is Code.DEADLINE_EXCEEDED


async def test_I11_one_agent_cannot_hold_more_calls_than_its_share(controller: TrustedController) -> None:
    device, other = await controller.enrolled("greedy"), await controller.enrolled("modest")
    share = MAX_CALLS[Role.AGENT]
    async with controller.channel(device.tls) as channel:
        calls = [FleetServiceStub(channel).Session() for _ in range(share + 20)]
        async with asyncio.timeout(TIMEOUT_S):
            ended, _ = await asyncio.wait([asyncio.create_task(call.code()) for call in calls], timeout=2)
        assert [task.result() for task in ended] == [Code.RESOURCE_EXHAUSTED] * 20

        # However they end, they count no more.
        for call in calls:
            call.cancel()
        assert await controller.is_served(other)
        assert await controller.is_served(device)


async def test_I11_calls_that_ended_do_not_count(controller: TrustedController) -> None:
    device = await controller.enrolled()
    live = open_inference_pb2.ServerLiveRequest()
    async with controller.channel(device.tls) as channel:
        stub = GRPCInferenceServiceStub(channel)
        for _ in range(2 * MAX_CALLS[Role.AGENT]):
            assert (await stub.ServerLive(live, timeout=TIMEOUT_S)).live


async def test_I12_a_device_whose_clock_starts_in_1970_believes_the_controller(controller: TrustedController) -> None:
    shown = controller.identity.server_identity()
    leaf, *others = x509.load_pem_x509_certificates(shown.certificate_chain)
    roots = Store(x509.load_pem_x509_certificates(shown.trust_bundle))
    first_boot = datetime(1970, 1, 1, 0, 1, tzinfo=UTC)

    verifier = PolicyBuilder().store(roots).time(first_boot).build_server_verifier(x509.DNSName(CONTROLLER_DNS_NAME))

    assert verifier.verify(leaf, others)[0] == leaf


async def test_I12_a_certificate_counts_although_the_controllers_clock_was_minutes_ahead(
    controller: TrustedController,
) -> None:
    controller.clock.shift(timedelta(minutes=4))
    device = await controller.enrolled()
    controller.clock.shift(timedelta())

    assert await controller.is_served(device)


# ---- who is no part of the fleet ------------------------------------------------------------------------------


async def test_a_plaintext_client_gets_nothing_from_either_port(controller: TrustedController) -> None:
    for address in (controller.main_address, controller.enrolment.address):
        async with grpc.aio.insecure_channel(str(address)) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await sent(channel, "/inference.GRPCInferenceService/ServerLive", timeout_s=3)
        assert refusal.value.code() in {Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED}


async def test_a_client_without_a_certificate_gets_nothing_from_the_main_port(controller: TrustedController) -> None:
    credentials = grpc.ssl_channel_credentials(controller.identity.trust_bundle())
    async with grpc.aio.secure_channel(
        str(controller.main_address), credentials, options=MUTUAL_TLS_OPTIONS
    ) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await sent(channel, "/inference.GRPCInferenceService/ServerLive", timeout_s=3)

    assert refusal.value.code() in {Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED}


async def test_a_client_certified_by_another_authority_gets_nothing(controller: TrustedController) -> None:
    key, foreign = new_key(), CertificateAuthority.make(trust_domain=DOMAIN, now=controller.clock.now())
    certificate = foreign.issue(
        Peer(DOMAIN, Role.AGENT, CAM), public_key_of(key.public_key()), now=controller.clock.now()
    )
    tls = TlsIdentity(certificate.pem, key_pem(key), controller.identity.trust_bundle())
    async with controller.channel(tls) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await GRPCInferenceServiceStub(channel).ServerLive(open_inference_pb2.ServerLiveRequest(), timeout=3)

    assert refusal.value.code() in {Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED}


async def test_a_client_that_trusts_another_authority_says_nothing_to_us(controller: TrustedController) -> None:
    device = await controller.enrolled()
    foreign = CertificateAuthority.make(trust_domain=DOMAIN, now=controller.clock.now())
    tls = TlsIdentity(device.tls.certificate_chain, device.tls.private_key, foreign.certificate_pem)
    async with controller.channel(tls) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await GRPCInferenceServiceStub(channel).ServerLive(open_inference_pb2.ServerLiveRequest(), timeout=3)

    assert refusal.value.code() in {Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED}
