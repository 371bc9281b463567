"""One renewal with the controller's enrolment port, from the challenge to a checked identity; nothing is retried here.

The proof is made by the child process, in the name of the key that counts. A reply may be lost after the controller
acted on it: the key that was sent is in the folder as the pending one and is sent again, and the controller answers the
older key until it has seen the new one in use. Should it refuse, those before are tried: a controller restored from a
backup knows only them.
"""

import asyncio
import errno
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import grpc
import grpc.aio

from core.clock import Clock
from core.errors import DiskFull, Forbidden, InvalidRequest, TooLarge, Unavailable, Untrusted
from core.grpc_transport import TlsIdentity
from core.ids import SiteId, checked_name
from core.spiffe import Peer, Role
from edge_agent.identity.channel import ENROLMENT_OPTIONS, error_of_call
from edge_agent.identity.child import Child
from edge_agent.identity.folder import Identity, IdentityFolder
from protos.identity.v1 import identity_pb2 as pb
from protos.identity.v1.identity_pb2_grpc import EnrolmentServiceStub

if TYPE_CHECKING:
    from protos.identity.v1.identity_pb2_grpc import EnrolmentServiceAsyncStub

CALL_TIMEOUT_S = 20.0
# Derived: eight authorities in PEM, and some.
MAX_BUNDLE_BYTES = 32 << 10
# Derived: a certificate and those between it and its authority.
MAX_CHAIN_BYTES = 32 << 10
# Bound on what is handed to the child.
MAX_NONCE_BYTES = 1024

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Refused(Forbidden):
    """The controller does not renew for this key: unknown, banned, or too late."""


class Exchange:
    def __init__(self, folder: IdentityFolder, *, disk: Executor, child: Child, clock: Clock) -> None:
        self._folder, self._disk, self._child, self._clock = folder, disk, child, clock

    async def renew(self, present: Identity) -> Identity:
        """Return the identity that follows `present`; it is checked, and not written down yet.

        Raises:
            Refused: in the name of every key that we hold.
            NanofleetError: the controller is away or not the controller, or sent what does not hold.
        """
        async with _enrolment_port(present) as stub:
            refused = None
            for signer in await self._signers(present):
                try:
                    return await self._renew_as(signer, present, stub)
                except Refused as error:
                    refused = refused or error
            assert refused is not None
            raise refused

    async def _signers(self, present: Identity) -> list[bytes]:
        keys = [present, *await on_disk(self._disk, self._folder.earlier)]
        return list(dict.fromkeys(identity.tls.private_key for identity in keys))

    async def _renew_as(self, signer: bytes, present: Identity, stub: "EnrolmentServiceAsyncStub") -> Identity:
        challenge = pb.ChallengeRequest(agent_id=present.agent_id)
        try:
            reply: pb.ChallengeReply = await stub.Challenge(challenge, timeout=CALL_TIMEOUT_S)
            key, request = await self._proof(signer, present, reply.nonce)
            credential: pb.Credential = await stub.Renew(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            failure = error_of_call(error.code(), error.details(), target=present.enrolment)
            if error.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
                raise Refused(f"{failure}; if this agent is to stay, enrol it again with --force") from error
            if isinstance(failure, InvalidRequest):
                await on_disk(self._disk, self._folder.forget_pending)
            raise failure from error
        return await self._checked(credential, present, key)

    async def _proof(self, signer: bytes, present: Identity, nonce: bytes) -> tuple[bytes, pb.RenewRequest]:
        if len(nonce) > MAX_NONCE_BYTES:
            raise TooLarge(f"challenge: expected at most {MAX_NONCE_BYTES} bytes, got {len(nonce)}")
        pending = await on_disk(self._disk, self._folder.pending_key)
        if pending is None or pending == present.tls.private_key:
            pending = b""
        body = {"signer": signer.decode(), "key": pending.decode(), "nonce": b64encode(nonce).decode()}
        answer = await self._child("renewal", body)
        key = answer["key"].encode()
        # Before it is sent: when the reply is lost, the same key is asked for again.
        await on_disk(self._disk, self._folder.keep_pending, key)
        csr, signature = b64decode(answer["csr"]), b64decode(answer["signature"])
        return key, pb.RenewRequest(agent_id=present.agent_id, nonce=nonce, csr=csr, signature=signature)

    async def _checked(self, credential: pb.Credential, present: Identity, key: bytes) -> Identity:
        chain, bundle = credential.certificate_chain, credential.trust_bundle
        if len(chain) > MAX_CHAIN_BYTES or len(bundle) > MAX_BUNDLE_BYTES:
            raise TooLarge(f"certificate: expected at most {MAX_CHAIN_BYTES} bytes, got {len(chain)} and {len(bundle)}")
        body = {
            "chain": text_of(chain),
            "bundle": text_of(bundle),
            "key": key.decode(),
            "peer": str(Peer(present.trust_domain, Role.AGENT, present.agent_id)),
            "now": self._clock.now().isoformat(),
        }
        validity = await self._child("credential", body)
        return replace(
            present,
            site=SiteId(checked_name(credential.site, kind="site")),
            not_before=datetime.fromisoformat(validity["not_before"]),
            not_after=datetime.fromisoformat(validity["not_after"]),
            tls=TlsIdentity(chain, key, bundle),
        )


@asynccontextmanager
async def _enrolment_port(identity: Identity) -> AsyncIterator["EnrolmentServiceAsyncStub"]:
    """Yield the service over a connection on which only the controller shows a certificate."""
    credentials = grpc.ssl_channel_credentials(identity.tls.trust_bundle)
    target = str(identity.enrolment)
    async with grpc.aio.secure_channel(target, credentials, options=ENROLMENT_OPTIONS) as channel:
        yield EnrolmentServiceStub(channel)


async def on_disk(
    disk: Executor, work: Callable[Arguments, Result], *args: Arguments.args, **options: Arguments.kwargs
) -> Result:
    """Run `work` on the disk's thread.

    Raises:
        DiskFull: there is no room.
        Unavailable: the disk failed otherwise.
    """
    try:
        return await asyncio.get_running_loop().run_in_executor(disk, lambda: work(*args, **options))
    except OSError as error:
        kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else Unavailable
        raise kind(f"identity: the disk failed: {error.strerror}") from error


def text_of(pem: bytes) -> str:
    try:
        return pem.decode("ascii")
    except UnicodeDecodeError as error:
        raise Untrusted(f"certificate: expected PEM, got {len(pem)} bytes of something else") from error
