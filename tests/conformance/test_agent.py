"""The stock tritonclient, and curl, against a real agent's own faces."""

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import orjson
import pytest

from core.digest import digest_of_file
from core.manifest import File, Lineage, Manifest, Signature
from core.tensors import TensorSpec
from tests.conformance.test_tritonclient import GRPC_ONLY, HTTP_ONLY, SHARED
from tests.support import conformance_models as models
from tests.support.edge_models import BuiltModel
from tests.support.offline_agent import offline_agent
from tests.support.triton_client import run_checks

# ONNX Runtime takes bfloat16, but numpy has no such type to hand it over in.
NOT_ON_AGENTS = "bfloat16_comes_back_as_it_went"
AGENTS_ONLY = (
    "statistics_count_what_was_answered",
    "a_model_that_is_deployed_can_be_loaded",
    "statistics_and_schedule_policy_are_advertised",
)
CHECKS = (*(check for check in SHARED if check != NOT_ON_AGENTS), *AGENTS_ONLY)
CURL_TIMEOUT_S = 20


def built(
    folder: Path, name: str, content: bytes, specs: tuple[Sequence[TensorSpec], Sequence[TensorSpec]]
) -> BuiltModel:
    folder.mkdir()
    path = folder / "model.onnx"
    path.write_bytes(content)
    inputs, outputs = [
        tuple(Signature(name=spec.name, datatype=spec.datatype, shape=spec.shape) for spec in side) for side in specs
    ]
    manifest = Manifest(
        model=name,
        version=1,
        variant="original",
        entry="model.onnx",
        files=(File(path="model.onnx", digest=digest_of_file(path), size_bytes=len(content)),),
        inputs=inputs,
        outputs=outputs,
        lineage=Lineage(recipe="original"),
    )
    return BuiltModel(manifest, manifest.digest(), folder)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    folder = tmp_path_factory.mktemp("agent")
    served = [
        built(folder / "everything", models.EVERYTHING, models.everything(), models.everything_specs()),
        built(folder / "arithmetic", models.ARITHMETIC, models.arithmetic(), models.arithmetic_specs()),
    ]
    environment = {"HTTP_BIND": "127.0.0.1:0"}
    with offline_agent(folder / "state", models=served, broker=None, environment=environment) as agent:
        yield agent.faces()


@pytest.fixture(scope="module")
def http_results(faces: Mapping[str, str]) -> dict[str, str]:
    return run_checks("http_checks", faces["http"], *CHECKS, *HTTP_ONLY, proof=("--agent",))


@pytest.fixture(scope="module")
def grpc_results(faces: Mapping[str, str]) -> dict[str, str]:
    return run_checks("grpc_checks", faces["grpc"], *CHECKS, *GRPC_ONLY, proof=("--agent",))


@pytest.mark.parametrize("check", [*CHECKS, *HTTP_ONLY])
def test_http(http_results: dict[str, str], check: str) -> None:
    assert not http_results[check], http_results[check]


@pytest.mark.parametrize("check", [*CHECKS, *GRPC_ONLY])
def test_grpc(grpc_results: dict[str, str], check: str) -> None:
    assert not grpc_results[check], grpc_results[check]


# ---- curl, and the paths that KServe asks -----------------------------------------------------------------------


def curl(*words: str) -> tuple[int, bytes]:
    command = ["curl", "--silent", "--show-error", "--write-out", "%{stderr}%{http_code}", *words]
    done = subprocess.run(command, check=True, capture_output=True, timeout=CURL_TIMEOUT_S)
    return int(done.stderr), done.stdout


BODY = orjson.dumps(
    {"inputs": [{"name": name, "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]} for name in ("a", "b")]}
).decode()


def test_curl_with_its_defaults_is_answered(faces: Mapping[str, str]) -> None:
    status, body = curl("--data", BODY, f"http://{faces['http']}/v2/models/arithmetic/versions/1/infer")

    assert status == 200, body
    assert orjson.loads(body)["outputs"][0]["data"] == [2, 4, 6, 8]


def test_curl_that_asks_before_a_large_body_is_answered_without_its_second_of_waiting(
    faces: Mapping[str, str], tmp_path: Path
) -> None:
    rows = 60_000
    inputs = [{"name": name, "shape": [rows, 4], "datatype": "FP32", "data": [1] * (4 * rows)} for name in ("a", "b")]
    large = tmp_path / "body.json"
    large.write_bytes(orjson.dumps({"inputs": inputs, "outputs": [{"name": "sum"}]}))
    words = ["--data-binary", f"@{large}", "--header", "Expect: 100-continue", "--expect100-timeout", "15"]
    status, body = curl(*words, "--max-time", "10", f"http://{faces['http']}/v2/models/arithmetic/infer")

    assert status == 200, body[:200]
    assert len(orjson.loads(body)["outputs"][0]["data"]) == 4 * rows


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("/v2/health/live", "live"),
        ("/v2/health/ready", "ready"),
        ("/v2", "extensions"),
        ("/v2/", "extensions"),
        ("/v2/models/arithmetic", "platform"),
        ("/v2/models/arithmetic/versions/1", "platform"),
        ("/v2/models/arithmetic/ready", "ready"),
        ("/v2/models/stats", "model_stats"),
        ("/v2/models/arithmetic/versions/1/stats", "model_stats"),
    ],
)
def test_the_paths_of_the_protocol_are_served(faces: Mapping[str, str], path: str, key: str) -> None:
    status, body = curl(f"http://{faces['http']}{path}")

    assert status == 200, body
    assert key in orjson.loads(body)
