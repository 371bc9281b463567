"""A protobuf body is counted before it is parsed: hostile ones cost no memory, honest ones pass."""

import subprocess
import sys

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from core.errors import TooLarge
from core.open_inference import protobuf_body
from core.open_inference.messages import DEFAULT_LIMITS, BodyLimits, InferRequest
from core.open_inference.protobuf_bounds import REQUEST, RESPONSE, require_bounds
from core.tensors import Datatype, Tensor
from protos.inference.v2 import open_inference_pb2 as pb
from tests.support.open_inference_strategies import PATIENT, requests

Input = pb.ModelInferRequest.InferInputTensor


def delimited(number: int, content: bytes) -> bytes:
    """Return a field that holds `content`."""
    size = len(content)
    length = bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes((number << 3 | 2, *length, size)) + content


EMPTY = {number: delimited(number, b"") for number in range(1, 9)}
PARAMETERS = EMPTY[4] * 65
# One hostile body per place, and the words that refuse it.
EXCESSES = {
    "inputs": (EMPTY[5] * 65, "inputs: expected at most 64, got 65"),
    "outputs": (EMPTY[6] * 65, "outputs: expected at most 64"),
    "raw": (EMPTY[7] * 65, "raw_input_contents: expected at most 64"),
    "parameters": (PARAMETERS, "parameters: expected at most 64"),
    "parameters_of_an_input": (delimited(5, PARAMETERS), "parameters: expected at most 64"),
    "parameters_of_an_output": (delimited(6, EMPTY[2] * 65), "parameters: expected at most 64"),
    "unpacked_shape": (delimited(5, b"\x18\x01" * 9), "shape: expected at most 8"),
    "packed_shape": (delimited(5, delimited(3, b"\x01" * 81)), "shape: expected at most 8, got 9"),
    "strings": (delimited(5, delimited(5, EMPTY[8] * 1000)), "at most 1000 fields"),
    "unpacked_elements": (delimited(5, delimited(5, b"\x08\x01" * 1000)), "at most 1000 fields"),
    "elements_over_many_contents": (delimited(5, delimited(5, b"\x08\x01") * 500), "at most 1000 fields"),
    "fields_of_a_parameter": (delimited(4, delimited(2, b"\x08\x01" * 1000)), "at most 1000 fields"),
    "repeated_names": (b"\x0a\x01a" * 1001, "at most 1000 fields"),
    "unknown_fields": (b"\x78\x01" * 1001, "at most 1000 fields"),
    "a_tag_of_two_bytes": (b"\xaa\x00\x00" * 65, "inputs: expected at most 64, got 65"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "words"), EXCESSES.values(), ids=EXCESSES)
def test_an_excess_is_refused_wherever_it_stands(body: bytes, words: str) -> None:
    with pytest.raises(TooLarge, match=words):
        require_bounds(body, REQUEST, limits=BodyLimits(max_json_values=1000))


@pytest.mark.parametrize("body", [EMPTY[5] * 65, EMPTY[6] * 65, PARAMETERS, delimited(5, PARAMETERS)])
def test_a_response_is_bounded_by_its_own_fields(body: bytes) -> None:
    with pytest.raises(TooLarge, match="expected at most 64"):
        require_bounds(body, RESPONSE, limits=DEFAULT_LIMITS)
    with pytest.raises(TooLarge):
        protobuf_body.parse_response(body)


def test_the_walk_stops_at_the_first_excess() -> None:
    # What follows would be malformed.
    with pytest.raises(TooLarge, match="inputs"):
        require_bounds(EMPTY[5] * 65 + b"\xff" * 20, REQUEST, limits=DEFAULT_LIMITS)


@pytest.mark.parametrize(
    "body",
    [
        b"\x2a", b"\x2a\x05", b"\x2a\x80", b"\x08", b"\x09\0", b"\x0d\0", b"\x08" + b"\xff" * 10 + b"\0",
        b"\x0b\x0c", b"\x0e", b"\xff" * 5 + b"\x7f\0", delimited(5, b"\x0a\x01") + b"a",
    ],
)  # fmt: skip
def test_malformed_wire_data_is_refused_as_the_parser_would(body: bytes) -> None:
    with pytest.raises(DecodeError):
        require_bounds(body, REQUEST, limits=DEFAULT_LIMITS)


def test_as_many_as_the_limits_allow_pass() -> None:
    tensor = Input(name="x", datatype="UINT8", shape=[(1 << 63) - 1] * 8)
    tensor.contents.bytes_contents.extend([b"a"] * 1000)
    message = pb.ModelInferRequest(inputs=[tensor] * 64, raw_input_contents=[b""] * 64)
    for index in range(64):
        message.parameters[str(index)].int64_param = index
    assert protobuf_body.parse_request(message.SerializeToString()) == message


def test_packed_elements_are_one_field() -> None:
    message = pb.ModelInferRequest(
        inputs=[Input(name="x", contents=pb.InferTensorContents(fp32_contents=[0.5] * 9999))]
    )
    require_bounds(message.SerializeToString(), REQUEST, limits=BodyLimits(max_json_values=10))


@PATIENT
@given(requests())
def test_every_request_that_we_encode_passes(request: InferRequest) -> None:
    require_bounds(protobuf_body.encode_request(request).SerializeToString(), REQUEST, limits=DEFAULT_LIMITS)


@PATIENT
@given(st.binary(max_size=100))
def test_random_bytes_end_the_walk_in_a_verdict(body: bytes) -> None:
    try:
        require_bounds(body, REQUEST, limits=BodyLimits(max_json_values=20))
    except (DecodeError, TooLarge):
        return


# The parser's memory is not Python's, so only the process can tell; one of its own, as the peak never falls.
MEASURE = """
import resource
from core.errors import TooLarge
from core.open_inference import protobuf_body
unit = bytes.fromhex({unit!r})
body = unit * ((16 << 20) // len(unit))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    protobuf_body.parse_request(body)
except TooLarge:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("unit", [EMPTY[5], EMPTY[6], b"\x0a\x01a", b"\x78\x01"])
def test_sixteen_mebibytes_of_fields_take_no_memory_beside_themselves(unit: bytes) -> None:
    script = MEASURE.format(unit=unit.hex())
    grown = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True, timeout=60)
    assert int(grown.stdout) < 4096  # KiB


def test_a_tensor_of_raw_bytes_is_not_read() -> None:
    tensor = Tensor("x", Datatype.UINT8, np.full(1 << 20, 255, np.uint8))
    body = protobuf_body.encode_request(InferRequest("digits", (tensor,))).SerializeToString()
    require_bounds(body, REQUEST, limits=BodyLimits(max_json_values=8))
