"""Nothing that matters crosses the network in clear: a real controller and a real agent, and a recording of their wire.

While it is recorded an agent enrols, connects, gets a model pushed and fetches it, and an application asks the model.
The same words are then said on a port without TLS, to show that the search would have found them.
"""

import asyncio
import base64
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import onnx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from onnx import helper
from rich.console import Console

from controller.demo.operator import Operator
from controller.demo.processes import Parts
from controller.demo.stack import Controller, free_address, write_toml
from controller.identity.authority import CertificateAuthority, key_pem, new_key, public_key_of
from core.addresses import Address
from core.clock import SystemClock
from core.enrolment_token import parse_token
from core.grpc_transport import MUTUAL_TLS_OPTIONS, TlsIdentity, open_channel
from core.open_inference import protobuf_body
from core.open_inference.messages import InferRequest, InferResponse
from core.spiffe import CONTROLLER_DNS_NAME, Peer, Role
from core.tensors import Array, Datatype, Tensor
from core.tls_files import IDENTITY_FILE, TRUST_FILE, read_tls_identity, write_tls_identity
from protos.identity.v1 import identity_pb2 as identity_pb
from protos.identity.v1.identity_pb2_grpc import EnrolmentServiceStub
from protos.inference.v2.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.support import wire
from tests.support.fake_heavy import FakeHeavy
from tests.support.onnx_models import model_of

# Words that occur nowhere by chance.
AGENT, SITE, MODEL, APPLICATION = "kattegat-lighthouse", "skagerrak-strait", "herring-counter", "harbour-office"
# The default of the controller.
DOMAIN = "nanofleet.local"
FEATURES = 256
TIMEOUT_S = 30.0
# So long a run of random bytes is in no other place.
RUN_BYTES = 32
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Fleet:
    """A controller that runs, and who operates it."""

    controller: Controller
    operator: Operator
    parts: Parts
    folder: Path

    @property
    def application(self) -> Path:
        """Where the identity of an application is."""
        return self.folder / "application"


@dataclass(frozen=True, slots=True)
class Observed:
    """What was recorded, and what must not be in it."""

    recording: wire.Recording
    secrets: dict[str, list[bytes]]
    fleet: Fleet


@pytest.fixture(scope="module")
def heavy() -> Iterator[FakeHeavy]:
    """A heavy tier that answers `y = 3 x`, in a loop of its own."""
    tier, loop = FakeHeavy(), asyncio.new_event_loop()
    loop.run_until_complete(tier.start())
    thread = threading.Thread(target=loop.run_forever, name="heavy")
    thread.start()
    yield tier
    asyncio.run_coroutine_threadsafe(tier.stop(), loop).result(TIMEOUT_S)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(TIMEOUT_S)
    loop.close()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, heavy: FakeHeavy) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    controller = Controller.planned(folder / "controller")
    with pytest.MonkeyPatch.context() as environment, Parts(folder / "logs") as parts:
        environment.setenv("NANOFLEET_HEAVY__MODE", "url")
        environment.setenv("NANOFLEET_HEAVY__URL", heavy.url)
        controller.initialise(parts)
        controller.wait_for_heavy(controller.start(parts))
        fleet = Fleet(controller, Operator(controller, Console(quiet=True)), parts, folder)
        fleet.operator.run("authority", "certify", APPLICATION, "--folder", str(fleet.application))
        yield fleet


@pytest.fixture(scope="module")
def observed(fleet: Fleet) -> Observed:
    model, question = made_model(), np.random.default_rng(2).normal(size=(1, FEATURES)).astype(np.float32)
    (fleet.folder / "model.onnx").write_bytes(model)
    ports = [fleet.controller.grpc.port, fleet.controller.enrolment.port]
    with wire.recorded(fleet.folder, ports=ports) as recording:
        fleet.operator.run("models", "publish", MODEL, str(fleet.folder / "model.onnx"))
        token = fleet.operator.token(site=SITE, agent=AGENT)
        deliver(fleet, token)
        answer = asyncio.run(ask(fleet, question))
        secrets = {
            "the model": runs_of(model),
            "the model's name": [MODEL.encode()],
            "the agent's name": [AGENT.encode()],
            "the site": [SITE.encode()],
            "the application's name": [APPLICATION.encode()],
            "the question": runs_of(question.tobytes()),
            "the answer": runs_of(answer),
            "the token": forms_of(token),
        }
        for word in chain.from_iterable(secrets.values()):
            recording.say(word)
    return Observed(recording, secrets, fleet)


# ---- what was recorded ----------------------------------------------------------------------------------------------


def test_nothing_of_models_names_questions_or_tokens_crosses_in_clear(observed: Observed) -> None:
    recording, controller = observed.recording, observed.fleet.controller
    streams = recording.streams(controller.grpc.port) + recording.streams(controller.enrolment.port)
    directions = [direction for stream in streams for direction in (stream.sent, stream.answered)]

    # The model went over it, so there was something to find.
    assert sum(map(len, directions)) > FEATURES * FEATURES
    assert [name for name, words in observed.secrets.items() if is_any_in(words, directions)] == []


def test_the_search_finds_all_of_it_where_it_is_said_without_tls(observed: Observed) -> None:
    [spoken] = observed.recording.streams(observed.recording.spoken_port)

    for name, words in observed.secrets.items():
        assert all(word in spoken.sent for word in words), name


def test_nothing_of_it_is_anywhere_else_in_the_capture(observed: Observed) -> None:
    capture = observed.recording.raw()

    # Once, where it was said aloud: not in the headers of packets, nor between them.
    for name, words in observed.secrets.items():
        assert all(capture.count(word) == words.count(word) for word in words), name


def test_every_connection_is_tls_1_3_from_its_first_byte(observed: Observed) -> None:
    for address in (observed.fleet.controller.grpc, observed.fleet.controller.enrolment):
        streams = observed.recording.streams(address.port)

        # On the one the agent and the application, on the other a look at the authority and the enrolment.
        assert len(streams) >= 2
        for stream in streams:
            assert stream.client_hello()
            assert stream.negotiated_version() == wire.TLS_1_3
            assert is_all_encrypted_after_the_hello(stream.sent)
            assert is_all_encrypted_after_the_hello(stream.answered)


# ---- who is no member of the fleet ----------------------------------------------------------------------------------


@pytest.mark.parametrize("port", ["grpc", "enrolment"])
def test_a_client_without_tls_gets_nothing(fleet: Fleet, port: str) -> None:
    address = address_of(fleet, port)
    with grpc.insecure_channel(str(address)) as channel:
        assert refusal(channel, port) is grpc.StatusCode.UNAVAILABLE

    with socket.create_connection((address.host, address.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(HTTP2_PREFACE)
        answered = until_the_end(connection)
    # At most a TLS alert: no HTTP/2 frame, no record with application bytes.
    assert {record.kind for record in wire.records(answered)} <= {wire.ALERT}


@pytest.mark.parametrize("port", ["grpc", "enrolment"])
def test_a_client_that_believes_another_authority_sends_nothing(fleet: Fleet, port: str) -> None:
    other = CertificateAuthority.make(trust_domain=DOMAIN, now=SystemClock().now())
    credentials = grpc.ssl_channel_credentials(other.certificate_pem)
    with grpc.secure_channel(str(address_of(fleet, port)), credentials, options=MUTUAL_TLS_OPTIONS) as channel:
        assert refusal(channel, port) is grpc.StatusCode.UNAVAILABLE


def test_a_certificate_of_another_authority_gets_nothing(fleet: Fleet, tmp_path: Path) -> None:
    stranger, address = forged(fleet), fleet.controller.grpc
    credentials = stranger.channel_credentials()
    with grpc.secure_channel(str(address), credentials, options=MUTUAL_TLS_OPTIONS) as channel:
        assert refusal(channel, "grpc") is grpc.StatusCode.UNAVAILABLE

    write_tls_identity(tmp_path, stranger)
    context = believing(fleet)
    context.load_cert_chain(tmp_path / IDENTITY_FILE)
    assert application_bytes(address, context) == b""


def test_a_client_without_a_certificate_gets_nothing(fleet: Fleet) -> None:
    assert application_bytes(fleet.controller.grpc, believing(fleet)) == b""


def test_a_member_gets_an_answer_the_same_way(fleet: Fleet) -> None:
    context = believing(fleet)
    context.load_cert_chain(fleet.application / IDENTITY_FILE)

    # HTTP/2 settings: what the others would have got, had they been let in.
    assert application_bytes(fleet.controller.grpc, context)


# ---- the fleet at work ----------------------------------------------------------------------------------------------


def made_model() -> bytes:
    """Return a model of random weights that no compression makes smaller: chunks of it travel as they are."""
    weights = np.random.default_rng(1).integers(-128, 128, size=(FEATURES, FEATURES)).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["packed", "scale"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    model: onnx.ModelProto = model_of(
        nodes,
        inputs={"x": ["n", FEATURES]},
        outputs={"y": ["n", FEATURES]},
        weights={"packed": weights, "scale": np.array(0.01, np.float32)},
    )
    return model.SerializeToString()


def deliver(fleet: Fleet, token: str) -> None:
    """Let an agent in, run it and have it fetch the model."""
    state_dir = fleet.folder / "agent"
    enrolling = fleet.parts.start_python("enrol", "edge_agent", "enrol", token, "--state-dir", str(state_dir))
    enrolling.finish(timeout_s=TIMEOUT_S)
    top = {"state_dir": str(state_dir), "grpc_bind": str(free_address())}
    config = write_toml(fleet.folder / "agent.toml", top, mqtt={"enabled": False}, link={"first_delay_s": 0.0})
    fleet.parts.start_python("agent", "edge_agent", "run", "--config", str(config))
    wait_until_online(fleet)
    fleet.operator.run("deploy", MODEL, "--variant", "original", "--agent", AGENT)


def wait_until_online(fleet: Fleet) -> None:
    give_up_s = time.monotonic() + TIMEOUT_S
    while not any(agent["is_online"] for agent in fleet.operator.run("devices", "list")["agents"]):
        assert time.monotonic() < give_up_s
        time.sleep(0.1)


async def ask(fleet: Fleet, question: Array) -> bytes:
    """Ask the heavy tier as an application does; return the bytes of its answer."""
    request = InferRequest(MODEL, (Tensor("x", Datatype.FP32, question),))
    async with open_channel(fleet.controller.grpc, read_tls_identity(fleet.application)) as channel:
        message = await GRPCInferenceServiceStub(channel).ModelInfer(
            protobuf_body.encode_request(request), timeout=TIMEOUT_S
        )
    response: InferResponse = protobuf_body.decode_response(message)
    np.testing.assert_array_equal(response.outputs[0].array, question * 3)
    return response.outputs[0].array.tobytes()


def runs_of(content: bytes) -> list[bytes]:
    """Return every run of random bytes; those of one value, such as padding, are nobody's secret."""
    runs = (content[at : at + RUN_BYTES] for at in range(0, len(content) - RUN_BYTES, RUN_BYTES))
    return [run for run in runs if len(set(run)) > RUN_BYTES // 2]


def forms_of(token: str) -> list[bytes]:
    """Return the ways in which a token's secret may be written."""
    secret = parse_token(token).secret
    encoded = (base64.urlsafe_b64encode(secret), base64.b64encode(secret))
    # Often the two are the same, which is then looked for, and said, once.
    return [secret, secret.hex().encode(), *{each.rstrip(b"=") for each in encoded}]


# ---- looking at it --------------------------------------------------------------------------------------------------


def is_any_in(words: list[bytes], directions: list[bytes]) -> bool:
    return any(word in direction for direction in directions for word in words)


def is_all_encrypted_after_the_hello(direction: bytes) -> bool:
    """Say whether nothing but application data follows the hello, except the empty word for old middleboxes."""
    _, *others = wire.records(direction)
    change_cipher_spec = wire.Record(wire.CHANGE_CIPHER_SPEC, b"\x01")
    return bool(others) and all(
        record.kind == wire.APPLICATION_DATA or record == change_cipher_spec for record in others
    )


def address_of(fleet: Fleet, port: str) -> Address:
    return fleet.controller.grpc if port == "grpc" else fleet.controller.enrolment


def refusal(channel: grpc.Channel, port: str) -> grpc.StatusCode:
    """Call what the port offers; return how that failed."""

    def call() -> object:
        if port == "grpc":
            return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        request = identity_pb.ChallengeRequest(agent_id=AGENT)
        return EnrolmentServiceStub(channel).Challenge(request, timeout=TIMEOUT_S)

    with pytest.raises(grpc.RpcError) as refused:
        call()
    code: grpc.StatusCode = refused.value.code()
    return code


def forged(fleet: Fleet) -> TlsIdentity:
    """Return an agent's identity as the fleet makes them, by another authority; it believes this fleet's."""
    now, key = SystemClock().now(), new_key()
    other = CertificateAuthority.make(trust_domain=DOMAIN, now=now)
    certificate = other.issue(Peer(DOMAIN, Role.AGENT, AGENT), public_key_of(key.public_key()), now=now)
    return TlsIdentity(certificate.pem, key_pem(key), (fleet.application / TRUST_FILE).read_bytes())


def believing(fleet: Fleet) -> ssl.SSLContext:
    """Return a client's side of TLS that believes this fleet's controller."""
    context = ssl.create_default_context(cafile=str(fleet.application / TRUST_FILE))
    context.set_alpn_protocols(["h2"])
    return context


def application_bytes(address: Address, context: ssl.SSLContext) -> bytes:
    """Speak HTTP/2 inside TLS; return what the server says there, whether it ends in order or not."""
    with socket.create_connection((address.host, address.port), timeout=TIMEOUT_S) as connection:
        try:
            with context.wrap_socket(connection, server_hostname=CONTROLLER_DNS_NAME) as secured:
                secured.sendall(HTTP2_PREFACE)
                return secured.recv(1 << 16)
        except (ssl.SSLError, ConnectionError):
            return b""


def until_the_end(connection: socket.socket) -> bytes:
    answered = bytearray()
    while block := connection.recv(1 << 16):
        answered += block
    return bytes(answered)
