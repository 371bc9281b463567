from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from controller.heavy.model import Answer, HostedModel, Job
from core.deadline import Deadline
from core.digest import digest_of
from core.errors import DeadlineExceeded, InternalError, ModelNotReady
from core.manifest import Batching, Manifest, Signature, parse_manifest
from core.tensors import Array, Datatype
from tests.support.clocks import HeldClock
from tests.support.heavy_tier import MemoryBlobs, publish, scaling_onnx

CLOCK = HeldClock(monotonic_s=100.0)


def scaling_manifest(*, max_batch: int = 1) -> Manifest:
    blobs = MemoryBlobs()
    return parse_manifest(blobs.contents[publish(blobs, scaling_onnx(3.0), max_batch=max_batch)])


def hosted(folder: Path, manifest: Manifest, content: bytes | None = None) -> HostedModel:
    (folder / "model.onnx").write_bytes(scaling_onnx(3.0) if content is None else content)
    return HostedModel(digest_of(b"any"), manifest, folder, threads=1)


def job(model: HostedModel, x: Array, *, deadline: Deadline | None = None) -> Job:
    return Job(model, {"x": x}, tuple(model.signature.outputs), deadline)


def rows(count: int, value: float) -> Array:
    return np.full((count, 4), value, np.float32)


def test_jobs_that_fit_together_share_a_run(tmp_path: Path) -> None:
    model = hosted(tmp_path, scaling_manifest(max_batch=8))
    answers = model.run([job(model, rows(1, 1.0)), job(model, rows(2, 2.0))], CLOCK)
    assert [answer.batch for answer in answers if isinstance(answer, Answer)] == [2, 2]
    for answer, expected in zip(answers, (rows(1, 3.0), rows(2, 6.0)), strict=True):
        assert isinstance(answer, Answer)
        np.testing.assert_array_equal(answer.outputs[0].array, expected)


def test_what_has_expired_is_not_run_and_does_not_disturb_the_others(tmp_path: Path) -> None:
    model = hosted(tmp_path, scaling_manifest(max_batch=8))
    late, early = Deadline(100.0), Deadline(100.5)
    expired, answered = model.run(
        [job(model, rows(1, 1.0), deadline=late), job(model, rows(1, 2.0), deadline=early)], CLOCK
    )
    assert isinstance(expired, DeadlineExceeded)
    assert isinstance(answered, Answer)
    assert answered.batch == 1


def test_a_run_that_fails_is_the_error_of_its_own_group_alone(tmp_path: Path) -> None:
    manifest = scaling_manifest().model_copy(
        update={"inputs": (Signature(name="x", datatype=Datatype.FP32, shape=(-1, -1)),)}
    )
    model = hosted(tmp_path, manifest)
    failed, answered = model.run([job(model, np.ones((1, 3), np.float32)), job(model, rows(1, 2.0))], CLOCK)
    assert isinstance(failed, InternalError)
    assert isinstance(answered, Answer)


def one_output_onnx(
    node: onnx.NodeProto, x: onnx.ValueInfoProto, y: onnx.ValueInfoProto, constants: list[onnx.TensorProto]
) -> bytes:
    graph = helper.make_graph([node], "small", [x], [y], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(made.SerializeToString())


def gathering(folder: Path) -> HostedModel:
    """Host a model that looks `x` up in a table of ten entries, and fails on any other index."""
    onnx_bytes = one_output_onnx(
        helper.make_node("Gather", ["table", "x"], ["y"]),
        helper.make_tensor_value_info("x", TensorProto.INT64, ["n"]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"]),
        [helper.make_tensor("table", TensorProto.FLOAT, [10], [float(index) for index in range(10)])],
    )
    changes = {
        "inputs": (Signature(name="x", datatype=Datatype.INT64, shape=(-1,)),),
        "outputs": (Signature(name="y", datatype=Datatype.FP32, shape=(-1,)),),
    }
    return hosted(folder, scaling_manifest(max_batch=8).model_copy(update=changes), onnx_bytes)


def lookup(model: HostedModel, index: int, *, deadline: Deadline | None = None) -> Job:
    return job(model, np.array([index], np.int64), deadline=deadline)


def test_a_request_that_makes_its_batch_fail_fails_alone(tmp_path: Path) -> None:
    model = gathering(tmp_path)
    first, failed, last = model.run([lookup(model, index) for index in (1, 99, 2)], CLOCK)
    assert isinstance(failed, InternalError)
    for answer, expected in ((first, 1.0), (last, 2.0)):
        assert isinstance(answer, Answer)
        assert (answer.batch, answer.outputs[0].array.tolist()) == (1, [expected])


class SteppingClock(HeldClock):
    """Passes a second at each look, so that the failed batch takes time."""

    def monotonic_s(self) -> float:
        self._monotonic_s += 1.0
        return self._monotonic_s


def test_what_expires_while_its_batch_fails_is_not_run_again(tmp_path: Path) -> None:
    model = gathering(tmp_path)
    jobs = [lookup(model, 99), lookup(model, 1, deadline=Deadline(101.5)), lookup(model, 2)]
    failed, expired, answered = model.run(jobs, SteppingClock(monotonic_s=99.0))
    assert isinstance(failed, InternalError)
    assert isinstance(expired, DeadlineExceeded)
    assert isinstance(answered, Answer)


def test_requests_that_cannot_be_taken_apart_again_run_alone(tmp_path: Path) -> None:
    onnx_bytes = one_output_onnx(
        helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, []),
        [],
    )
    changes = {"outputs": (Signature(name="y", datatype=Datatype.FP32, shape=()),)}
    model = hosted(tmp_path, scaling_manifest(max_batch=8).model_copy(update=changes), onnx_bytes)
    answers = model.run([job(model, rows(1, 1.0)), job(model, rows(1, 2.0))], CLOCK)
    assert [float(answer.outputs[0].array) for answer in answers if isinstance(answer, Answer)] == [4.0, 8.0]


def test_text_goes_in_and_out_as_bytes(tmp_path: Path) -> None:
    echo = one_output_onnx(
        helper.make_node("Identity", ["x"], ["y"]),
        helper.make_tensor_value_info("x", TensorProto.STRING, ["n"]),
        helper.make_tensor_value_info("y", TensorProto.STRING, ["n"]),
        [],
    )
    texts = (Signature(name="x", datatype=Datatype.BYTES, shape=(-1,)),)
    manifest = scaling_manifest().model_copy(
        update={"inputs": texts, "outputs": (texts[0].model_copy(update={"name": "y"}),)}
    )
    model = hosted(tmp_path, manifest, echo)
    (answer,) = model.run([job(model, np.array(["grün".encode(), b""], dtype=object))], CLOCK)
    assert isinstance(answer, Answer)
    assert answer.outputs[0].array.tolist() == ["grün".encode(), b""]


def test_a_file_that_is_not_onnx_is_not_ready(tmp_path: Path) -> None:
    with pytest.raises(ModelNotReady, match="'scaling': ONNX Runtime cannot load it"):
        hosted(tmp_path, scaling_manifest(), b"not ONNX")


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ((Signature(name="x", datatype=Datatype.FP64, shape=(-1, 4)),), None),
        ((Signature(name="z", datatype=Datatype.FP32, shape=(-1, 4)),), None),
        (None, (Signature(name="z", datatype=Datatype.FP32, shape=(-1, 4)),)),
    ],
)
def test_a_model_that_is_not_as_its_manifest_says_is_not_ready(
    tmp_path: Path, inputs: tuple[Signature, ...] | None, outputs: tuple[Signature, ...] | None
) -> None:
    changes = {key: value for key, value in (("inputs", inputs), ("outputs", outputs)) if value is not None}
    with pytest.raises(ModelNotReady, match=r"expected (in|out)puts"):
        hosted(tmp_path, scaling_manifest().model_copy(update=changes))


def test_batching_over_the_manifests_bound_takes_several_runs(tmp_path: Path) -> None:
    manifest = scaling_manifest().model_copy(update={"batching": Batching(max_batch=2)})
    model = hosted(tmp_path, manifest)
    answers = model.run([job(model, rows(1, float(value))) for value in range(5)], CLOCK)
    assert [answer.batch for answer in answers if isinstance(answer, Answer)] == [2, 2, 2, 2, 1]
