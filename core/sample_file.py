"""A hard example as one file: an `.npz` that numpy alone loads, without pickle, with its description inside.

    sample.json        what it is: model, version, reason, confidence, …, and which tensor each array is
    input/NAME.npy     what the model was given
    edge/NAME.npy      what the edge model said
    heavy/NAME.npy     what the heavy tier said, where it answered: the label

`numpy.load(file)["input/pixels"]` is an array, `["sample.json"]` the bytes of the description. Two datatypes have no
array of their own: BF16 is uint16 with the raw bits, BYTES is uint8 with the elements as the Open Inference Protocol
has them (uint32 length, then bytes; the shape stands in the description). A name of a tensor that is no plain word is
replaced by the tensor's number.

Whoever reads one that came from elsewhere compares its digest first; the description is bounded all the same.
"""

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.errors import IntegrityError
from core.open_inference.raw_elements import raw_of
from core.tensors import Array, Datatype, Tensor

FORMAT = 1
DESCRIPTION = "sample.json"
# Chosen: some hundred tensors.
MAX_DESCRIPTION_BYTES = 1 << 16
# Chosen: pictures as floats shrink to a third with the fastest level, and hardly more with a slow one.
_LEVEL = 1
# What `zipfile` raises for bytes that are no archive, or one that we would not have written.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, KeyError, ValueError, OSError, EOFError, RuntimeError)
_PLAIN = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class TensorView(BaseModel):
    """One array of the file."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    key: str
    """Its key in the `.npz`, such as `input/pixels`."""
    name: str
    datatype: Datatype
    shape: tuple[int, ...]


class SampleView(BaseModel):
    """What a sample is; the content of `sample.json`, and with the agent and the file's name a line of the index."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    format: int = Field(default=FORMAT, ge=1, le=FORMAT)
    taken_at: datetime
    model: str
    version: str
    variant: str
    manifest: str
    """Digest of the manifest, which names every byte of the variant."""
    reason: str
    """Why it was kept: a word of the cascade, such as `low_confidence` or `tied`."""
    tier: str
    """Who answered the request: `edge`, `heavy`; `edge` too where a flawed answer was given to nobody."""
    privacy: str
    """`any`, or `site`: such a sample does not leave its site."""
    confidence: float | None
    """Of the edge model's answer; None where its outputs were flawed."""
    flaw: str | None
    label: int | None
    """The class that the edge model predicted, in the least sure row."""
    heavy_label: int | None
    """The class that the heavy tier predicted there; None where it did not answer."""
    heavy_model: str | None
    tensors: tuple[TensorView, ...]


@dataclass(frozen=True, slots=True)
class SampleTensors:
    inputs: Sequence[Tensor]
    edge: Sequence[Tensor]
    heavy: Sequence[Tensor] = ()


def encode_sample(view: SampleView, tensors: SampleTensors) -> bytes:
    """Return the file of a sample; `view.tensors` is filled in here."""
    parts = {"input": tensors.inputs, "edge": tensors.edge, "heavy": tensors.heavy}
    keyed = [
        (f"{part}/{_key(tensor.name, number)}", tensor)
        for part, members in parts.items()
        for number, tensor in enumerate(members)
    ]
    views = tuple(
        TensorView(key=key, name=tensor.name, datatype=tensor.datatype, shape=tensor.array.shape)
        for key, tensor in keyed
    )
    described = view.model_copy(update={"tensors": views})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=_LEVEL) as archive:
        # First, so that whoever looks at many reads only their beginnings.
        archive.writestr(zipfile.ZipInfo(DESCRIPTION), described.model_dump_json())
        for key, tensor in keyed:
            member = zipfile.ZipInfo(f"{key}.npy")
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, _npy(_storable(tensor)), compresslevel=_LEVEL)
    return buffer.getvalue()


def read_description(content: bytes) -> SampleView:
    """Return what the sample in `content` is; of the rest only the directory is looked at.

    Raises:
        IntegrityError: it is no sample, or not of a format that is known here.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.getinfo(DESCRIPTION).file_size > MAX_DESCRIPTION_BYTES:
                raise IntegrityError(f"sample: expected a description of at most {MAX_DESCRIPTION_BYTES} bytes")
            with archive.open(DESCRIPTION) as member:
                return SampleView.model_validate_json(member.read(MAX_DESCRIPTION_BYTES))
    except ValidationError as error:
        raise IntegrityError(f"sample: {DESCRIPTION} has {error.error_count()} errors") from error
    except _UNREADABLE as error:
        raise IntegrityError(f"sample: expected an .npz with {DESCRIPTION}, got {type(error).__name__}") from error


def _key(name: str, number: int) -> str:
    return name if _PLAIN.fullmatch(name) else str(number)


def _storable(tensor: Tensor) -> Array:
    """Return the array to store: without elements that only pickle could write."""
    if tensor.datatype is Datatype.BYTES:
        return np.frombuffer(raw_of(tensor), np.uint8)
    return tensor.array


def _npy(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
