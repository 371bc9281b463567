"""The manifest of one model variant: everything a machine needs to know to fetch, check and run it.

It names every file by digest, so the digest of the manifest's canonical bytes identifies the variant as a whole; that
digest is what desired state, the heavy tier and lineage refer to. Canonical bytes: JSON, keys sorted, no white space.
"""

from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from core.digest import Digest, digest_of
from core.errors import InvalidManifest
from core.ids import Name, Tag
from core.privacy import PrivacyClass
from core.tensors import Datatype, TensorSpec

# Derived: about 60 bytes a chunk, so it holds for models of 64 GiB; a hostile one cannot fill memory.
MAX_MANIFEST_BYTES = 4 << 20
MAX_CHUNK_BYTES = 1 << 20
# A variable dimension is -1; the bound keeps a product of dimensions inside 64 bits.
Dimension = Annotated[int, Field(ge=-1, le=1 << 31)]
DigestText = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
# Relative, forward slashes, no empty, hidden or parent segment: it can only land inside its own folder.
FilePath = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$", max_length=255)
]


def _is_absent(value: object) -> bool:
    """Leave fields that came later out of the canonical bytes when they say nothing: old digests stay as they are."""
    return value is None or value == ()


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# Size in bytes, and the BLAKE3 (256 bits) in base64url without padding: the shortest form that JSON carries.
Chunk = tuple[
    Annotated[int, Field(ge=1, le=MAX_CHUNK_BYTES)], Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{43}$")]
]


class File(_Part):
    """A file of the variant. Its chunks, in order, are what travels to agents; see `core.chunks`."""

    path: FilePath
    digest: DigestText
    size_bytes: Annotated[int, Field(ge=0, le=1 << 40)]
    # Empty when the file is empty, and in variants that are never delivered to agents.
    chunks: Annotated[tuple[Chunk, ...], Field(max_length=1 << 16, exclude_if=_is_absent)] = ()

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.chunks and (total_bytes := sum(size for size, _ in self.chunks)) != self.size_bytes:
            raise ValueError(f"expected chunks of {self.size_bytes} bytes in all, got {total_bytes}")
        return self


class Signature(_Part):
    """An input or output of the model."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    datatype: Datatype
    # As many dimensions as a request may have.
    shape: Annotated[tuple[Dimension, ...], Field(max_length=8)]

    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.datatype, self.shape)


class ScoreKind(StrEnum):
    """What the numbers of the score output are."""

    LOGITS = "logits"
    PROBABILITIES = "probabilities"


class Cascade(_Part):
    """When the answer of this variant is good enough, and who answers otherwise.

    The confidence is the largest entry of softmax(z / temperature), z the logits or the logarithm of the probabilities
    (Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2). Below `threshold` the request escalates.
    """

    escalate_to: Name
    score_output: Annotated[str, Field(min_length=1, max_length=256)]
    score_kind: ScoreKind
    temperature: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
    threshold: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Batching(_Part):
    """Requests that may share one run; the first dimension of every input and output is then the batch."""

    max_batch: Annotated[int, Field(ge=1, le=1024)] = 1


class SelfTest(_Part):
    """Golden inputs and the outputs that the publisher got; an agent asks them before it lets a variant serve.

    `file` is an .npz with `input.<name>` and `output.<name>`, (samples, …) each: one run with a batch of all samples,
    or one run per sample when the variant does not batch. Outputs are equal when |got - want| <= atol + rtol * |want|.
    """

    file: FilePath
    rtol: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    atol: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    # Bounds on one run after warm-up (95th percentile) and on the process; None: not judged.
    max_latency_p95_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_rss_bytes: Annotated[int, Field(gt=0)] | None = None


class Lineage(_Part):
    """How the variant was made; `parent` is the manifest digest of the variant it was made from."""

    recipe: Name
    parent: DigestText | None = None


class Manifest(_Part):
    # 2: chunks by BLAKE3.
    schema_version: Literal[2] = 2
    model: Name
    version: Annotated[int, Field(ge=1, le=1 << 31)]
    variant: Name
    platform: Literal["onnx_onnxv1"] = "onnx_onnxv1"
    # The file that the runtime opens; the other files are what it refers to.
    entry: FilePath
    files: Annotated[tuple[File, ...], Field(min_length=1, max_length=4096)]
    inputs: Annotated[tuple[Signature, ...], Field(min_length=1, max_length=64)]
    outputs: Annotated[tuple[Signature, ...], Field(min_length=1, max_length=64)]
    batching: Batching = Batching()
    cascade: Cascade | None = None
    lineage: Lineage
    # Grows with every release of the model; an agent installs nothing below the floor that the catalogue states, and
    # nothing without one.
    release_counter: Annotated[int, Field(ge=1, le=1 << 31)] | None = Field(default=None, exclude_if=_is_absent)
    # Tags that an agent must have, for example "arch:x86_64".
    requires: Annotated[tuple[Tag, ...], Field(max_length=32, exclude_if=_is_absent)] = ()
    self_test: SelfTest | None = Field(default=None, exclude_if=_is_absent)
    # Share of right answers on the publisher's held-out data, where it was measured.
    accuracy_ratio: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None, exclude_if=_is_absent
    )

    # How far the data of requests to this model may go, whatever else they say: `device` stays on the agent that was
    # asked, `site` within its site. None: the model sets no bound.
    privacy: PrivacyClass | None = Field(default=None, exclude_if=_is_absent)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        paths = [file.path for file in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError("expected every file path once")
        folders = {str(folder) for path in paths for folder in PurePosixPath(path).parents}
        if both := folders.intersection(paths):
            raise ValueError(f"expected {min(both)!r} to be a file or a folder, got both")
        for signatures in (self.inputs, self.outputs):
            if len({part.name for part in signatures}) != len(signatures):
                raise ValueError("expected every name of an input or output once")
        if self.entry not in paths:
            raise ValueError(f"expected the entry {self.entry!r} among the files")
        if self.self_test is not None and self.self_test.file not in paths:
            raise ValueError(f"expected the self-test {self.self_test.file!r} among the files")
        if self.cascade is not None and self.cascade.score_output not in {output.name for output in self.outputs}:
            raise ValueError(f"expected the score output {self.cascade.score_output!r} among the outputs")
        return self

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def to_bytes(self) -> bytes:
        """Return the canonical bytes, over which the digest is taken."""
        return orjson.dumps(self.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS)

    def digest(self) -> Digest:
        return digest_of(self.to_bytes())


def parse_manifest(content: bytes) -> Manifest:
    """Return the manifest in `content`.

    Raises:
        InvalidManifest: too large, not JSON, an unknown or missing key, or a value out of range.
    """
    if len(content) > MAX_MANIFEST_BYTES:
        raise InvalidManifest(f"manifest: expected at most {MAX_MANIFEST_BYTES} bytes, got {len(content)}")
    try:
        # Strict: a text that reads as a number would be other bytes when written again, and so another digest.
        return Manifest.model_validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part)[:80] for part in first["loc"]) or "as a whole"
        raise InvalidManifest(f"manifest: {where}: {first['msg']} ({error.error_count()} errors)") from error
