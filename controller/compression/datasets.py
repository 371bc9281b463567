"""Labelled samples from an uploaded .npz file, read without trusting it.

An .npz file is a zip of .npy files. Both say how large they are before they are read, so a small file that unpacks to
a huge one, or claims a huge shape, is refused from its headers alone. Pickles are never loaded.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from core.errors import InvalidRequest
from core.tensors import Array

# Chosen: 100,000 images of 3 x 32 x 32 bytes fit in it, and twice of it in the child's smallest memory limit.
MAX_ARRAY_BYTES = 256 << 20
MAX_SAMPLES = 1_000_000
MAX_DIMENSIONS = 8
_MEMBERS = frozenset({"inputs.npy", "labels.npy"})
# The largest header that numpy itself writes for our few dimensions is 128 bytes.
_MAX_HEADER_CHARS = 4096


@dataclass(frozen=True, slots=True)
class Samples:
    """`inputs` (N, …) of any numeric type and `labels` (N,) int64, N at least 1."""

    inputs: Array
    labels: Array

    def __len__(self) -> int:
        return len(self.labels)


def load_samples(path: Path) -> Samples:
    """Read a data set.

    Raises:
        InvalidRequest: not an .npz file of `inputs` and `labels` that belong together, or over a bound.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive)
            samples = Samples(_read(archive, "inputs.npy"), _read(archive, "labels.npy"))
    # NotImplementedError: a compression method that this Python lacks; RuntimeError: an encrypted member.
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise InvalidRequest(
            f"data set: expected an .npz file that numpy.savez wrote, got an error: {error}"
        ) from error
    _check_together(samples)
    return samples


def _check_members(archive: zipfile.ZipFile) -> None:
    names = [member.filename for member in archive.infolist()]
    if sorted(names) != sorted(_MEMBERS):
        raise InvalidRequest(
            f"data set: expected the arrays inputs and labels, got {[name[:80] for name in names[:8]]}"
        )
    for member in archive.infolist():
        if member.file_size > MAX_ARRAY_BYTES:
            raise InvalidRequest(
                f"data set: {member.filename}: expected at most {MAX_ARRAY_BYTES} bytes, got {member.file_size}"
            )


def _read(archive: zipfile.ZipFile, name: str) -> Array:
    with archive.open(name) as file:
        shape, dtype, header_bytes = _header(file)
    content_bytes = archive.getinfo(name).file_size - header_bytes
    if dtype.hasobject or dtype.kind not in "biuf":
        raise InvalidRequest(f"data set: {name}: expected numbers, got {dtype}; pickled objects are never read")
    if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0 or _size_bytes(shape, dtype) != content_bytes:
        raise InvalidRequest(f"data set: {name}: shape {list(shape)[:8]} of {dtype} does not fit {content_bytes} bytes")
    with archive.open(name) as file:
        array: Array = np.lib.format.read_array(file, allow_pickle=False, max_header_size=_MAX_HEADER_CHARS)
    return array


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=_MAX_HEADER_CHARS)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file, max_header_size=_MAX_HEADER_CHARS)
    else:
        raise InvalidRequest(f"data set: expected .npy format 1.0 or 2.0, got {version[0]}.{version[1]}")
    return shape, dtype, file.tell()


def _size_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    size_bytes = dtype.itemsize
    for dimension in shape:
        size_bytes *= dimension
    return size_bytes


def _check_together(samples: Samples) -> None:
    inputs, labels = samples.inputs, samples.labels
    if labels.ndim != 1 or labels.dtype != np.int64:
        raise InvalidRequest(f"data set: expected labels (N,) int64, got {list(labels.shape)} {labels.dtype}")
    if inputs.ndim < 1 or len(inputs) != len(labels):
        raise InvalidRequest(f"data set: expected one label per input, got {list(inputs.shape)} and {len(labels)}")
    if not 1 <= len(labels) <= MAX_SAMPLES:
        raise InvalidRequest(f"data set: expected 1 to {MAX_SAMPLES} samples, got {len(labels)}")
