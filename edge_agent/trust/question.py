"""What the gate asks its child process, and the answer: one JSON document each way, bounded and checked.

Nothing here imports TUF or cryptography: both processes use it.
"""

from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from core.addresses import Address, parse_address
from core.digest import Digest, parse_digest
from core.errors import DiskFull, InternalError, InvalidRequest, NanofleetError, Unavailable, Untrusted
from core.fleet_state import MetadataFile, SignedAssignment
from core.fleet_wire import MAX_ASSIGNMENT_BYTES, MAX_METADATA_BYTES, MAX_METADATA_FILES, MAX_SLOTS, MAX_TEXT_CHARS
from core.grpc_transport import TlsIdentity
from core.ids import AgentId, Name
from core.manifest import MAX_MANIFEST_BYTES

# Derived: metadata and assignment in base64, and room for names and paths.
MAX_QUESTION_BYTES = (MAX_METADATA_BYTES + MAX_ASSIGNMENT_BYTES) * 4 // 3 + (1 << 20)
# Derived: 256 slots of a digest and two numbers take 32 KiB.
MAX_ANSWER_BYTES = 1 << 18

# How a refusal travels; every other error is a defect.
_REFUSALS: dict[str, type[NanofleetError]] = {
    "untrusted": Untrusted,
    "unavailable": Unavailable,
    "disk_full": DiskFull,
    "invalid_request": InvalidRequest,
}


@dataclass(frozen=True, slots=True)
class CatalogueSource:
    """Who is asked for metadata that is not at hand. The key travels over a pipe that only the two processes hold."""

    controller: Address
    tls: TlsIdentity = field(repr=False)


@dataclass(frozen=True, slots=True)
class Question:
    """Whether the slots of `signed` that are not `running` may be installed; `folder` is the agent's trust folder."""

    folder: Path
    agent_id: AgentId
    signed: SignedAssignment
    running: frozenset[Digest] = frozenset()
    source: CatalogueSource | None = None


@dataclass(frozen=True, slots=True)
class Statement:
    """What the catalogue says about one manifest; the manifest's own bytes are not known yet."""

    length_bytes: int
    release_floor: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Yes: what the catalogue states about every slot that is new."""

    allowed: Mapping[Digest, Statement]
    # How far the machine's clock lies before what is certain to have passed; 0: not at all.
    clock_behind_s: float = 0.0


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _base64(text: str) -> str:
    b64decode(text, validate=True)
    return text


_Base64 = Annotated[str, AfterValidator(_base64)]
_DigestText = Annotated[str, AfterValidator(lambda text: _checked(parse_digest, text))]
_AddressText = Annotated[str, AfterValidator(lambda text: _checked(parse_address, text))]
_PathText = Annotated[str, Field(min_length=1, max_length=4096)]
# Chosen: some hundred certificates.
_Pem = Annotated[str, Field(max_length=1 << 18)]


class _File(_Part):
    name: Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
    content: _Base64


class _Source(_Part):
    controller: _AddressText
    certificate_chain: _Pem
    private_key: _Pem
    trust_bundle: _Pem


class _Question(_Part):
    folder: _PathText
    agent_id: Name
    payload: _Base64
    signature: _Base64
    key_id: Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
    catalogue: Annotated[list[_File], Field(max_length=MAX_METADATA_FILES)]
    running: Annotated[list[_DigestText], Field(max_length=4 * MAX_SLOTS)]
    source: _Source | None


class _Statement(_Part):
    length_bytes: Annotated[int, Field(ge=1, le=MAX_MANIFEST_BYTES)]
    release_floor: Annotated[int, Field(ge=0)]


class _Refusal(_Part):
    kind: str
    message: str


class _Answer(_Part):
    allowed: Annotated[dict[_DigestText, _Statement], Field(max_length=MAX_SLOTS)] = {}
    clock_behind_s: Annotated[float, Field(ge=0)] = 0.0
    refusal: _Refusal | None = None


def encode_question(question: Question) -> bytes:
    signed, source = question.signed, question.source
    return orjson.dumps(
        {
            "folder": str(question.folder),
            "agent_id": question.agent_id,
            "payload": _text(signed.payload),
            "signature": _text(signed.signature),
            "key_id": signed.key_id,
            "catalogue": [{"name": file.name, "content": _text(file.content)} for file in signed.catalogue],
            "running": sorted(question.running),
            "source": None if source is None else _source_fields(source),
        }
    )


def decode_question(content: bytes) -> Question:
    """Return the question in `content`.

    Raises:
        InvalidRequest: too large, not JSON, an unknown or missing key, or a value out of range.
    """
    if len(content) > MAX_QUESTION_BYTES:
        raise InvalidRequest(f"question: expected at most {MAX_QUESTION_BYTES} bytes, got {len(content)}")
    try:
        fields = _Question.model_validate_json(content)
    except ValidationError as error:
        raise InvalidRequest(f"question: {_first(error)}") from error
    files = tuple(MetadataFile(file.name, b64decode(file.content)) for file in fields.catalogue)
    return Question(
        Path(fields.folder),
        AgentId(fields.agent_id),
        SignedAssignment(b64decode(fields.payload), b64decode(fields.signature), fields.key_id, files),
        frozenset(Digest(digest) for digest in fields.running),
        None if fields.source is None else _source_of(fields.source),
    )


def encode_answer(answer: Answer) -> bytes:
    allowed = {
        digest: {"length_bytes": statement.length_bytes, "release_floor": statement.release_floor}
        for digest, statement in answer.allowed.items()
    }
    return orjson.dumps({"allowed": allowed, "clock_behind_s": answer.clock_behind_s})


def encode_refusal(error: NanofleetError) -> bytes:
    kind = next((kind for kind, refusal in _REFUSALS.items() if isinstance(error, refusal)), "internal")
    return orjson.dumps({"refusal": {"kind": kind, "message": str(error)[:MAX_TEXT_CHARS]}})


def decode_answer(content: bytes) -> Answer:
    """Return the yes in `content`, or raise the no.

    Raises:
        Untrusted: the assignment or the catalogue does not hold; asking again changes nothing.
        Unavailable: current metadata could not be had; ask again later.
        DiskFull: verified metadata could not be kept.
        InvalidRequest: the assignment makes no sense.
        InternalError: the child did not say anything that it should.
    """
    try:
        fields = _Answer.model_validate_json(content)
    except ValidationError as error:
        raise InternalError(f"answer of the verification: {_first(error)}") from error
    if fields.refusal is not None:
        raise _REFUSALS.get(fields.refusal.kind, InternalError)(fields.refusal.message)
    allowed = {
        Digest(digest): Statement(part.length_bytes, part.release_floor) for digest, part in fields.allowed.items()
    }
    return Answer(allowed, fields.clock_behind_s)


def _source_fields(source: CatalogueSource) -> dict[str, str]:
    return {
        "controller": str(source.controller),
        "certificate_chain": source.tls.certificate_chain.decode(),
        "private_key": source.tls.private_key.decode(),
        "trust_bundle": source.tls.trust_bundle.decode(),
    }


def _source_of(fields: _Source) -> CatalogueSource:
    chain, key, bundle = fields.certificate_chain, fields.private_key, fields.trust_bundle
    return CatalogueSource(parse_address(fields.controller), TlsIdentity(chain.encode(), key.encode(), bundle.encode()))


def _text(content: bytes) -> str:
    return b64encode(content).decode()


def _checked(parse: Callable[[str], object], text: str) -> str:
    try:
        parse(text)
    except InvalidRequest as error:
        raise ValueError(str(error)) from error
    return text


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part)[:80] for part in first["loc"]) or "as a whole"
    return f"{where}: {first['msg'][:200]}"
