"""Checks that tritonclient's HTTP and gRPC clients share, and how a program of checks runs.

The two clients have nearly the same methods; what differs is in `Dialect`.
"""

import argparse
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Check = Callable[[Any, "Dialect"], None]

SAMPLES: dict[str, Array] = {
    "BOOL": np.array([[True, False, True], [False, False, True]]),
    "UINT8": np.array([[0, 1, 255], [2, 3, 4]], np.uint8),
    "UINT16": np.array([[0, 1, 65535], [2, 3, 4]], np.uint16),
    "UINT32": np.array([[0, 1, 2**32 - 1], [2, 3, 4]], np.uint32),
    "UINT64": np.array([[0, 1, 2**64 - 1], [2, 3, 4]], np.uint64),
    "INT8": np.array([[-128, 0, 127], [2, 3, 4]], np.int8),
    "INT16": np.array([[-32768, 0, 32767], [2, 3, 4]], np.int16),
    "INT32": np.array([[-(2**31), 0, 2**31 - 1], [2, 3, 4]], np.int32),
    "INT64": np.array([[-(2**63), 0, 2**63 - 1], [2, 3, 4]], np.int64),
    "FP16": np.array([[-1.5, 0.0, 65504.0], [2, 3, 4]], np.float16),
    "FP32": np.array([[-1.5, 1e-40, 3.4e38], [0.1, 3, 4]], np.float32),
    "FP64": np.array([[-1.5, 5e-324, 1.7e308], [0.1, 3, 4]], np.float64),
    "BYTES": np.array([[b"", b"plain", "schön ☂".encode()], [b"a", b"b", b"c\n"]], np.object_),
}
A = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)
B = np.array([[0.5, 0.25, -1, 8], [1, 1, 1, 1]], np.float32)


@dataclass(frozen=True)
class Dialect:
    """`tritonclient.http` or `tritonclient.grpc`, and how the answers of the two are read alike."""

    module: Any
    # Makes a client of the server under test, of this module or of its asyncio flavour.
    connect: Callable[..., Any]
    # Our kinds of refusal → the status that this protocol has for them.
    statuses: Mapping[str, str]
    metadata_of: Callable[[Any, str], Mapping[str, Any]]
    index_of: Callable[[Any], Sequence[Mapping[str, Any]]]
    server_metadata_of: Callable[[Any], Mapping[str, Any]]
    response_of: Callable[[Any], Mapping[str, Any]]
    # Of the model of that name, or of all.
    statistics_of: Callable[[Any, str], Mapping[str, Any]]

    def input(self, name: str, datatype: str, array: Array) -> Any:
        made = self.module.InferInput(name, list(array.shape), datatype)
        made.set_data_from_numpy(array)
        return made

    def arithmetic(self) -> list[Any]:
        return [self.input("a", "FP32", A), self.input("b", "FP32", B)]

    def everything(self) -> list[Any]:
        return [self.input(f"in_{name}", name, array) for name, array in SAMPLES.items()]

    def require_refused(self, kind: str, words: Sequence[str], call: Callable[[], object]) -> None:
        from tritonclient.utils import InferenceServerException  # type: ignore[import-not-found]

        try:
            call()
        except InferenceServerException as error:
            require_equal(error.status(), self.statuses[kind])
            missing = [word for word in words if word not in error.message()]
            require_equal((missing, error.message()), ([], error.message()))
            return
        raise AssertionError(f"expected a refusal with {self.statuses[kind]}, got an answer")


def require_equal(found: object, expected: object) -> None:
    assert found == expected, f"expected {expected!r}, got {found!r}"


def require_array(found: Array, expected: Array) -> None:
    require_equal((found.shape, str(found.dtype)), (expected.shape, str(expected.dtype)))
    assert np.array_equal(found, expected), f"expected {expected!r}, got {found!r}"


# ---- health and metadata ----------------------------------------------------------------------------------------


def server_and_models_are_ready(client: Any, _dialect: Dialect) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("arithmetic")
    assert client.is_model_ready("arithmetic", "1")


def an_unknown_model_is_not_ready(client: Any, dialect: Dialect) -> None:
    from tritonclient.utils import InferenceServerException

    try:
        assert not client.is_model_ready("ghost")
    except InferenceServerException as error:
        require_equal(error.status(), dialect.statuses["unknown"])


def server_metadata_names_the_extensions(client: Any, dialect: Dialect) -> None:
    found = dialect.server_metadata_of(client)
    assert found["name"].startswith("nanofleet"), found
    assert "binary_tensor_data" in found["extensions"], found


def model_metadata_names_inputs_and_outputs(client: Any, dialect: Dialect) -> None:
    found = dialect.metadata_of(client, "arithmetic")
    require_equal((found["name"], found["platform"], found["versions"]), ("arithmetic", "onnx_onnxv1", ["1"]))
    tensors = [
        (tensor["name"], tensor["datatype"], [int(size) for size in tensor["shape"]]) for tensor in found["inputs"]
    ]
    require_equal(tensors, [("a", "FP32", [-1, 4]), ("b", "FP32", [-1, 4])])
    require_equal([tensor["name"] for tensor in found["outputs"]], ["sum", "difference", "product"])


def metadata_of_an_unknown_model_is_not_found(client: Any, dialect: Dialect) -> None:
    dialect.require_refused("unknown", ["ghost"], lambda: client.get_model_metadata("ghost"))
    dialect.require_refused("unknown", [], lambda: client.get_model_metadata("arithmetic", "77"))


def the_index_lists_ready_models(client: Any, dialect: Dialect) -> None:
    found = {(entry["name"], entry["version"], entry["state"]) for entry in dialect.index_of(client)}
    assert {("arithmetic", "1", "READY"), ("everything", "1", "READY")} <= found, found


def what_is_not_served_is_refused(client: Any, dialect: Dialect) -> None:
    dialect.require_refused("absent", [], client.get_trace_settings)
    dialect.require_refused("absent", [], client.get_log_settings)


# ---- what agents serve besides ----------------------------------------------------------------------------------


def statistics_count_what_was_answered(client: Any, dialect: Dialect) -> None:
    def counted() -> int:
        (found,) = dialect.statistics_of(client, "arithmetic")["model_stats"]
        require_equal((found["name"], found["version"]), ("arithmetic", "1"))
        return int(found.get("inference_stats", {}).get("success", {}).get("count", 0))

    before = counted()
    for _ in range(3):
        client.infer("arithmetic", dialect.arithmetic())
    require_equal(counted() - before, 3)
    names = {each["name"] for each in dialect.statistics_of(client, "")["model_stats"]}
    require_equal(names, {"arithmetic", "everything"})


def a_model_that_is_deployed_can_be_loaded(client: Any, dialect: Dialect) -> None:
    client.load_model("arithmetic")
    assert client.is_model_ready("arithmetic")
    dialect.require_refused("unknown", ["ghost"], lambda: client.load_model("ghost"))


def statistics_and_schedule_policy_are_advertised(client: Any, dialect: Dialect) -> None:
    found = set(dialect.server_metadata_of(client)["extensions"])
    assert {"statistics", "schedule_policy", "model_repository"} <= found, found


AGENTS: tuple[Check, ...] = (
    statistics_count_what_was_answered,
    a_model_that_is_deployed_can_be_loaded,
    statistics_and_schedule_policy_are_advertised,
)


# ---- inference --------------------------------------------------------------------------------------------------


def every_datatype_comes_back_as_it_went(client: Any, dialect: Dialect) -> None:
    result = client.infer("everything", dialect.everything())
    for name, array in SAMPLES.items():
        require_array(result.as_numpy(f"out_{name}"), array)


def bfloat16_comes_back_as_it_went(client: Any, dialect: Dialect) -> None:
    import ml_dtypes

    array = np.array([[1.5, -2.0, 3.25]], ml_dtypes.bfloat16)
    found = client.infer("brain-floats", [dialect.input("x", "BF16", array)]).as_numpy("y")
    require_equal(np.asarray(found, np.float32).tolist(), [[1.5, -2.0, 3.25]])


def a_model_computes(client: Any, dialect: Dialect) -> None:
    result = client.infer("arithmetic", dialect.arithmetic())
    require_array(result.as_numpy("sum"), A + B)
    require_array(result.as_numpy("difference"), A - B)
    require_array(result.as_numpy("product"), A * B)


def requested_outputs_come_in_the_requested_order(client: Any, dialect: Dialect) -> None:
    outputs = [dialect.module.InferRequestedOutput(name) for name in ("product", "sum")]
    result = client.infer("arithmetic", dialect.arithmetic(), outputs=outputs)
    names = [output["name"] for output in dialect.response_of(result)["outputs"]]
    require_equal(names, ["product", "sum"])
    require_array(result.as_numpy("product"), A * B)
    require_array(result.as_numpy("sum"), A + B)


def id_model_and_version_are_told(client: Any, dialect: Dialect) -> None:
    for version in ("", "1"):
        result = client.infer("arithmetic", dialect.arithmetic(), model_version=version, request_id="request-42")
        response = dialect.response_of(result)
        found = (response["id"], response["model_name"], response["model_version"])
        require_equal(found, ("request-42", "arithmetic", "1"))


def an_empty_batch_is_answered(client: Any, dialect: Dialect) -> None:
    empty = np.zeros((0, 4), np.float32)
    inputs = [dialect.input("a", "FP32", empty), dialect.input("b", "FP32", empty)]
    require_equal(client.infer("arithmetic", inputs).as_numpy("sum").shape, (0, 4))


def four_megabytes_are_answered(client: Any, dialect: Dialect) -> None:
    large = np.arange(1 << 20, dtype=np.float32).reshape(-1, 4)
    inputs = [dialect.input("a", "FP32", large), dialect.input("b", "FP32", large)]
    outputs = [dialect.module.InferRequestedOutput("sum")]
    require_array(client.infer("arithmetic", inputs, outputs=outputs).as_numpy("sum"), large + large)


# ---- refusals ---------------------------------------------------------------------------------------------------


def an_unknown_model_or_version_is_refused(client: Any, dialect: Dialect) -> None:
    inputs = dialect.arithmetic()
    dialect.require_refused("unknown", ["ghost"], lambda: client.infer("ghost", inputs))
    dialect.require_refused("unknown", [], lambda: client.infer("arithmetic", inputs, model_version="77"))


def a_wrong_shape_is_refused_naming_both(client: Any, dialect: Dialect) -> None:
    inputs = [dialect.input("a", "FP32", A[:, :2]), dialect.input("b", "FP32", B)]
    dialect.require_refused("invalid", ["[-1, 4]", "[2, 2]"], lambda: client.infer("arithmetic", inputs))


def a_wrong_datatype_is_refused_naming_both(client: Any, dialect: Dialect) -> None:
    inputs = [dialect.input("a", "INT32", A.astype(np.int32)), dialect.input("b", "FP32", B)]
    dialect.require_refused("invalid", ["FP32", "INT32"], lambda: client.infer("arithmetic", inputs))


def a_missing_input_is_refused(client: Any, dialect: Dialect) -> None:
    dialect.require_refused("invalid", ["'b'"], lambda: client.infer("arithmetic", dialect.arithmetic()[:1]))


def an_unknown_output_is_refused(client: Any, dialect: Dialect) -> None:
    outputs = [dialect.module.InferRequestedOutput("quotient")]
    call = lambda: client.infer("arithmetic", dialect.arithmetic(), outputs=outputs)  # noqa: E731
    dialect.require_refused("invalid", ["quotient"], call)


def a_body_beyond_the_bound_is_refused(client: Any, dialect: Dialect) -> None:
    huge = np.zeros((5 << 18, 4), np.float32)
    inputs = [dialect.input("a", "FP32", huge), dialect.input("b", "FP32", huge)]
    dialect.require_refused("too large", [], lambda: client.infer("arithmetic", inputs))


def a_timeout_that_has_passed_is_told(client: Any, dialect: Dialect) -> None:
    dialect.require_refused("too late", [], lambda: client.infer("arithmetic", dialect.arithmetic(), timeout=1))


SHARED: tuple[Check, ...] = (
    server_and_models_are_ready,
    an_unknown_model_is_not_ready,
    server_metadata_names_the_extensions,
    model_metadata_names_inputs_and_outputs,
    metadata_of_an_unknown_model_is_not_found,
    the_index_lists_ready_models,
    what_is_not_served_is_refused,
    every_datatype_comes_back_as_it_went,
    bfloat16_comes_back_as_it_went,
    a_model_computes,
    requested_outputs_come_in_the_requested_order,
    id_model_and_version_are_told,
    an_empty_batch_is_answered,
    four_megabytes_are_answered,
    an_unknown_model_or_version_is_refused,
    a_wrong_shape_is_refused_naming_both,
    a_wrong_datatype_is_refused_naming_both,
    a_missing_input_is_refused,
    an_unknown_output_is_refused,
    a_body_beyond_the_bound_is_refused,
    a_timeout_that_has_passed_is_told,
)


def parse_arguments(proof: str) -> argparse.Namespace:
    """Return what a program is told: `address`, `checks`, `agent`, and `proof`: the file or folder that says who asks.

    Without `proof` the server does not ask.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("checks", metavar="CHECK", nargs="*", help="all when none is named")
    parser.add_argument(f"--{proof}", type=Path)
    parser.add_argument("--agent", action="store_true", help="the server is an agent, which serves more")
    return parser.parse_args()


def checks_of(checks: Sequence[Check], arguments: argparse.Namespace) -> Sequence[Check]:
    return (*checks, *AGENTS) if arguments.agent else checks


def run_checks(checks: Sequence[Check], client: Any, dialect: Dialect, *, chosen: Sequence[str]) -> None:
    """Run all checks, or the chosen ones, and print check → "" or what went wrong."""
    results: dict[str, str] = {}
    for check in checks:
        if chosen and check.__name__ not in chosen:
            continue
        try:
            check(client, dialect)
            results[check.__name__] = ""
        except Exception:
            results[check.__name__] = traceback.format_exc()
    print(json.dumps(results))
