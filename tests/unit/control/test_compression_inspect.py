"""Which models are accepted, and with which words the others are refused. Every check runs in a real child process."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from controller.compression.model import ModelBundle
from controller.compression.workshop import ChildWorkshop
from core.errors import InvalidModel
from core.tensors import Datatype, TensorSpec
from tests.support.onnx_models import (
    FLOAT,
    bundle_of,
    conv_net,
    dense_net,
    digits,
    external_weights,
    model_of,
)

WORKSHOP = ChildWorkshop(timeout_s=60, memory_bytes=1 << 30, max_file_bytes=1 << 28)


async def refusal(bundle: ModelBundle) -> str:
    with pytest.raises(InvalidModel) as refused:
        await WORKSHOP.inspect(bundle)
    return str(refused.value)


def identity(*, domain: str = "", operator: str = "Identity") -> onnx.ModelProto:
    node = helper.make_node(operator, ["x"], ["y"], domain=domain)
    return model_of([node], inputs={"x": [1]}, outputs={"y": [1]}, domains=(domain,) if domain else ())


async def test_the_signature_is_read_with_variable_dimensions_as_minus_one(tmp_path: Path) -> None:
    inspected = await WORKSHOP.inspect(bundle_of(tmp_path, conv_net()))

    assert inspected.inputs == (TensorSpec("x", Datatype.FP32, (-1, 1, 8, 8)),)
    assert inspected.outputs == (TensorSpec("y", Datatype.FP32, (-1, 4)),)


async def test_a_classifier_of_scikit_learn_is_accepted(tmp_path: Path) -> None:
    inspected = await WORKSHOP.inspect(bundle_of(tmp_path, digits().model))

    assert inspected.outputs == (
        TensorSpec("label", Datatype.INT64, (-1,)),
        TensorSpec("probabilities", Datatype.FP32, (-1, 10)),
    )


async def test_external_data_among_the_extra_files_is_accepted(tmp_path: Path) -> None:
    model = dense_net()
    weights = external_weights(model, "weights.bin")

    inspected = await WORKSHOP.inspect(bundle_of(tmp_path, model, weights_bin=weights, tokenizer_json=b"{}"))

    assert inspected.outputs[0].name == "y"
    assert inspected.external_files == {"weights.bin"}


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 64, b"PK\x03\x04" + b"x" * 100])
async def test_what_is_not_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "expected an ONNX file" in await refusal(bundle_of(tmp_path, content))


async def test_a_truncated_model_is_refused(tmp_path: Path) -> None:
    content = dense_net().SerializeToString()

    assert "expected an ONNX file" in await refusal(bundle_of(tmp_path, content[: len(content) // 2]))


async def test_another_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.ort").write_bytes(dense_net().SerializeToString())

    assert "ends with .onnx" in await refusal(ModelBundle(tmp_path, "model.ort"))


async def test_a_custom_operator_is_refused_by_name(tmp_path: Path) -> None:
    reason = await refusal(bundle_of(tmp_path, identity(domain="evil", operator="Run")))

    assert "operator evil:Run is not accepted" in reason


async def test_an_operator_that_opens_files_is_refused(tmp_path: Path) -> None:
    reason = await refusal(bundle_of(tmp_path, identity(domain="com.microsoft", operator="EPContext")))

    assert "EPContext is not accepted" in reason


async def test_an_unknown_operator_is_refused(tmp_path: Path) -> None:
    assert "Bogus" in await refusal(bundle_of(tmp_path, identity(operator="Bogus")))


async def test_a_custom_operator_in_a_nested_graph_is_refused(tmp_path: Path) -> None:
    branches = {
        name: helper.make_graph(
            [helper.make_node("Run", ["x"], [name], domain="evil")],
            name,
            [],
            [helper.make_tensor_value_info(name, FLOAT, [1])],
        )
        for name in ("then", "other")
    }
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=onnx.TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], then_branch=branches["then"], else_branch=branches["other"]),
    ]
    model = model_of(nodes, inputs={"x": [1]}, outputs={"y": [1]}, domains=("evil",))

    assert "operator evil:Run is not accepted" in await refusal(bundle_of(tmp_path, model))


async def test_model_local_functions_are_refused(tmp_path: Path) -> None:
    model = identity()
    body = [helper.make_node("Run", ["a"], ["b"], domain="evil")]
    model.functions.append(helper.make_function("ai.onnx", "F", ["a"], ["b"], body, [helper.make_opsetid("", 18)]))

    assert "no model-local functions" in await refusal(bundle_of(tmp_path, model))


@pytest.mark.parametrize(
    "location", ["../secret", "/etc/passwd", "sub/../../secret", "weights.bin/../../secret", "", "*/_ORT_MEM_ADDR_/*"]
)
async def test_external_data_outside_the_bundle_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(1 << 16))
    folder = tmp_path / "bundle"
    folder.mkdir()
    model = dense_net()
    weights = external_weights(model, location)

    assert "is not among the extra files" in await refusal(bundle_of(folder, model, weights_bin=weights))


async def test_external_data_in_an_attribute_is_checked_too(tmp_path: Path) -> None:
    tensor = helper.make_tensor("value", FLOAT, [1], np.ones(1, np.float32).tobytes(), raw=True)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../secret"
    nodes = [helper.make_node("Constant", [], ["c"], value=tensor), helper.make_node("Add", ["x", "c"], ["y"])]

    reason = await refusal(bundle_of(tmp_path, model_of(nodes, inputs={"x": [1]}, outputs={"y": [1]})))

    assert "'../secret', which is not among the extra files" in reason


@pytest.mark.parametrize("fields", [{"length": 1 << 40}, {"offset": 1}, {"offset": -1}])
async def test_external_data_past_the_end_is_refused(tmp_path: Path, fields: dict[str, int]) -> None:
    model = dense_net()
    weights = external_weights(model, "weights.bin", **fields)

    reason = await refusal(bundle_of(tmp_path, model, weights_bin=weights))

    assert re.search("which has|whole number", reason)


@pytest.mark.parametrize(("ir_version", "expected"), [(2, "expected IR 3"), (99, "expected IR 3")])
async def test_other_versions_of_the_format_are_refused(tmp_path: Path, ir_version: int, expected: str) -> None:
    model = dense_net()
    model.ir_version = ir_version

    assert expected in await refusal(bundle_of(tmp_path, model))


@pytest.mark.parametrize("opset", [6, 999])
async def test_other_operator_sets_are_refused(tmp_path: Path, opset: int) -> None:
    model = dense_net()
    model.opset_import[0].version = opset

    assert "expected opset 7 to" in await refusal(bundle_of(tmp_path, model))


async def test_outputs_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("SequenceConstruct", ["x"], ["y"])]
    model = model_of(nodes, inputs={"x": [1]}, outputs={"y": [1]})
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_sequence_value_info("y", FLOAT, [1]))

    assert "expected a tensor" in await refusal(bundle_of(tmp_path, model))


async def test_a_refusal_does_not_name_our_folders(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "x"], ["y"])]
    model = model_of(nodes, inputs={"x": [2, 3]}, outputs={"y": [2, 3]})

    assert str(tmp_path) not in await refusal(bundle_of(tmp_path, model))
