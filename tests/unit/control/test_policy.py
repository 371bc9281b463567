"""Who may call what: the table covers every method of the mTLS port, and nothing else."""

import grpc_health.v1.health_pb2 as health
import pytest
from google.protobuf.descriptor import FileDescriptor
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from controller.api.policy import POLICY
from core.spiffe import Role
from protos.artifacts.v1 import artifacts_pb2
from protos.catalogue.v1 import catalogue_pb2
from protos.fleet.v1 import fleet_pb2
from protos.identity.v1 import identity_pb2
from protos.inference.v2 import open_inference_pb2
from protos.records.v1 import records_pb2
from protos.samples.v1 import samples_pb2

# Nobody needs it, and it would hold a call for ever.
CLOSED = {"/grpc.health.v1.Health/Watch"}
SERVED = (
    artifacts_pb2.DESCRIPTOR,
    catalogue_pb2.DESCRIPTOR,
    fleet_pb2.DESCRIPTOR,
    health.DESCRIPTOR,
    open_inference_pb2.DESCRIPTOR,
    records_pb2.DESCRIPTOR,
    samples_pb2.DESCRIPTOR,
    trace_service_pb2.DESCRIPTOR,
)


def methods_of(file: FileDescriptor) -> set[str]:
    return {
        f"/{service.full_name}/{method.name}"
        for service in file.services_by_name.values()
        for method in service.methods
    }


def test_the_table_covers_exactly_the_open_methods_of_the_port() -> None:
    assert set(POLICY) == set().union(*map(methods_of, SERVED)) - CLOSED


def test_enrolment_is_not_served_on_the_port_for_certificates() -> None:
    assert not set(POLICY) & methods_of(identity_pb2.DESCRIPTOR)


def test_no_method_is_open_to_nobody() -> None:
    assert all(POLICY.values())


@pytest.mark.parametrize(
    ("role", "services"),
    [
        (Role.HEAVY, {"ArtifactService", "TraceService", "Health"}),
        (Role.APPLICATION, {"GRPCInferenceService", "TraceService", "Health"}),
        (Role.DEVICE, set()),
        (Role.BROKER, set()),
    ],
)
def test_a_role_reaches_these_services_only(role: Role, services: set[str]) -> None:
    reached = {method.split("/")[1].rpartition(".")[2] for method, roles in POLICY.items() if role in roles}

    assert reached == services
