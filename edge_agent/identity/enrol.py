"""Enrolment: a token becomes an identity. Runs in the command, not in the agent; imports cryptography.

    look at the certificates of the enrolment port ─▶ the authority that the token names is among them, or stop
    connect again, believing that authority only ─▶ send secret and request ─▶ check what came ─▶ write it down

The secret leaves only over the second connection, whose peer has proven to be the controller of that authority. The
controller presents its certificate and, behind it, the authority's. When the reply is lost the same command may be
given again: the key was stored before it was sent, and is sent again.
"""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import grpc

from core.atomic_files import write_atomically
from core.enrolment_token import EnrolmentToken
from core.errors import Conflict, InvalidRequest, Untrusted
from core.grpc_transport import TlsIdentity
from core.ids import AgentId, SiteId, checked_name
from core.spiffe import Peer, Role
from edge_agent.identity import keys
from edge_agent.identity.channel import ENROLMENT_OPTIONS, error_of_call
from edge_agent.identity.folder import Identity, IdentityFolder, NotEnrolled
from edge_agent.identity.presented import presented_chain
from protos.identity.v1 import identity_pb2 as pb
from protos.identity.v1.identity_pb2_grpc import EnrolmentServiceStub

# Chosen: a controller under a flood of enrolments answers late rather than never.
ENROL_TIMEOUT_S = 30.0


def enrol(
    token: EnrolmentToken,
    folder: IdentityFolder,
    *,
    root_file: Path,
    wanted_id: str | None = None,
    force: bool = False,
    make_room: Callable[[Identity], None] = lambda _: None,
) -> Identity:
    """Make this machine an agent of the token's fleet, and return its identity.

    The root of the catalogue goes to `root_file`; `force` gives up an identity that is here already. `make_room`
    removes what belongs to another agent or fleet than the identity that it is given.

    Raises:
        Conflict: this machine has an identity already.
        IntegrityError: it has one that is damaged.
        Untrusted: the peer is not the controller that the token names, or what it sent does not hold.
        Forbidden: the controller refuses the token.
        InvalidRequest: it refuses the request, or `wanted_id` is no name.
        Unavailable: no controller answers.
    """
    if wanted_id is not None:
        checked_name(wanted_id, kind="name")
    if not force:
        _require_none(folder)
    now = datetime.now(UTC)
    authority = keys.pinned_authority(presented_chain(token.enrolment), sha256=token.authority_sha256, now=now)
    key = folder.pending_key() or keys.new_key()
    folder.keep_pending(key)
    csr = keys.certificate_request(key)
    request = pb.EnrolRequest(secret=token.secret, csr=csr, wanted_id=wanted_id or "", root_sha256=token.root_sha256)
    try:
        credential = _ask(token, request, authority=authority)
    except InvalidRequest:
        # Perhaps because of the key, which may have been certified for another identity; the next try makes a new one.
        folder.forget_pending()
        raise
    identity = _checked(credential, token, key=key, now=now)
    make_room(identity)
    write_atomically(root_file, credential.catalogue_root)
    # Last: from here on the machine counts as enrolled.
    folder.replace(identity)
    folder.confirm()
    return identity


def _require_none(folder: IdentityFolder) -> None:
    try:
        known = folder.load()
    except NotEnrolled:
        return
    raise Conflict(f"this machine is agent {known.agent_id} of site {known.site} already; --force gives that up")


def _ask(token: EnrolmentToken, request: pb.EnrolRequest, *, authority: bytes) -> pb.Credential:
    credentials = grpc.ssl_channel_credentials(authority)
    with grpc.secure_channel(str(token.enrolment), credentials, options=ENROLMENT_OPTIONS) as channel:
        try:
            return EnrolmentServiceStub(channel).Enrol(request, timeout=ENROL_TIMEOUT_S)
        except grpc.RpcError as error:
            call = cast("grpc.Call", error)
            raise error_of_call(call.code(), call.details(), target=token.enrolment) from error


def _checked(credential: pb.Credential, token: EnrolmentToken, *, key: bytes, now: datetime) -> Identity:
    """Return the identity in `credential`, believed only as far as the token reaches."""
    chain, bundle = credential.certificate_chain, credential.trust_bundle
    peer = Peer(token.trust_domain, Role.AGENT, checked_name(credential.agent_id, kind="agent"))
    validity = keys.check_credential(chain, bundle, key=key, peer=peer)
    if token.authority_sha256 not in keys.check_bundle(bundle, now=now):
        raise Untrusted("trust bundle: expected the authority that the token names to be in it, it is not")
    if hashlib.sha256(credential.catalogue_root).digest() != token.root_sha256:
        raise Untrusted("catalogue: expected the root that the token names, got another; do not use this controller")
    return Identity(
        AgentId(credential.agent_id),
        SiteId(checked_name(credential.site, kind="site")),
        token.trust_domain,
        token.controller,
        token.enrolment,
        token.root_sha256.hex(),
        validity.not_before,
        validity.not_after,
        TlsIdentity(chain, key, bundle),
    )
