"""The stock tritonclient against a real controller: gateway, Ray Serve and ONNX Runtime behind the same checks.

Over HTTP it shows the secret of an operator who may only read, over gRPC the certificate of an application.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from controller.demo.operator import Operator
from controller.demo.processes import Parts
from controller.demo.stack import Controller
from tests.conformance.test_tritonclient import GRPC_ONLY, HTTP_ONLY, SHARED
from tests.support import conformance_models as models
from tests.support.triton_client import run_checks

# Heavy replicas run ONNX models on numpy arrays, and numpy has no bfloat16.
NOT_ON_RAY = "bfloat16_comes_back_as_it_went"
EVERYWHERE = tuple(check for check in SHARED if check != NOT_ON_RAY)


@dataclass(frozen=True, slots=True)
class Gateway:
    controller: Controller
    # A viewer's file, and the folder of an application's certificate.
    credential: Path
    tls: Path


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    gateway = Gateway(Controller.planned(folder / "controller"), folder / "viewer.json", folder / "application")
    controller = gateway.controller
    with Parts(folder / "logs") as parts:
        controller.initialise(parts)
        part = controller.start(parts)
        operator = Operator(controller, Console(stderr=True))
        operator.run("operators", "add", "triton", "--role", "viewer", "--save", str(gateway.credential))
        operator.run("authority", "certify", "triton", "--folder", str(gateway.tls))
        publish(operator, folder, models.EVERYTHING, models.everything())
        publish(operator, folder, models.ARITHMETIC, models.arithmetic())
        controller.wait_for_heavy(part)
        yield gateway


def publish(operator: Operator, folder: Path, name: str, content: bytes) -> None:
    file = folder / f"{name}.onnx"
    file.write_bytes(content)
    operator.run("models", "publish", name, str(file))


@pytest.fixture(scope="module")
def http_results(gateway: Gateway) -> dict[str, str]:
    proof = ["--credential", str(gateway.credential)]
    return run_checks("http_checks", str(gateway.controller.http), *EVERYWHERE, *HTTP_ONLY, proof=proof)


@pytest.fixture(scope="module")
def grpc_results(gateway: Gateway) -> dict[str, str]:
    proof = ["--tls", str(gateway.tls)]
    return run_checks("grpc_checks", str(gateway.controller.grpc), *EVERYWHERE, *GRPC_ONLY, proof=proof)


@pytest.mark.parametrize("check", [*EVERYWHERE, *HTTP_ONLY])
def test_http(http_results: dict[str, str], check: str) -> None:
    assert not http_results[check], http_results[check]


@pytest.mark.parametrize("check", [*EVERYWHERE, *GRPC_ONLY])
def test_grpc(grpc_results: dict[str, str], check: str) -> None:
    assert not grpc_results[check], grpc_results[check]
