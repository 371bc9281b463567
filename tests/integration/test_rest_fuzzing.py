"""The operator's REST asked everything that its OpenAPI description allows, and much that it does not.

A real controller answers over a real port, on real stores. Examples are bounded and the same in every run.
"""

from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import APIOperation, BaseSchema, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from controller.access.model import OperatorRole
from controller.api.access_rules import Nobody, need
from tests.support.controller_process import ControllerProcess

AnyCase: TypeAlias = Case[Any]
AnyOperation: TypeAlias = APIOperation[Any, Any, Any, Any]

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
# Chosen: all of this file stays below 90 s on two busy cores.
EXAMPLES = 20
EXAMPLES_OF_A_STRANGER = 2
ONE_POLL_S = 0.01
TIMEOUT_S = 30.0


class Desk:
    """A running controller, its description, and credentials of every kind."""

    def __init__(self, controller: ControllerProcess) -> None:
        self.url = controller.endpoints()["controller_http"]
        self.admin = controller.bearer
        document = httpx.get(f"{self.url}/api/openapi.json", headers=self.admin).json()
        self.schema: BaseSchema = schemathesis.openapi.from_dict(document)
        body = {"name": "the-viewer", "role": OperatorRole.VIEWER.value}
        made = httpx.post(f"{self.url}/api/operators", json=body, headers=self.admin).json()
        self.viewer = {"authorization": f"Bearer {made['secret']}"}

    def operations(self) -> Iterator[AnyOperation]:
        for found in self.schema.get_all_operations():
            assert isinstance(found, Ok), found
            yield found.ok()

    def send(self, case: AnyCase, headers: Mapping[str, str]) -> schemathesis.Response:
        if "wait_s" in case.query and isinstance(case.query["wait_s"], float | int):
            # Nothing is learnt from waiting.
            case.query["wait_s"] = min(case.query["wait_s"], ONE_POLL_S)
        case.headers.pop("Authorization", None)
        return case.call(base_url=self.url, headers=dict(headers), timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder: Path = tmp_path_factory.mktemp("fuzzed")
    with ControllerProcess(folder / "data") as controller:
        yield Desk(controller)
        assert "Traceback" not in controller.log, controller.log


def fuzzed(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_answer_is_as_described_and_none_is_a_defect(desk: Desk, mode: GenerationMode) -> None:
    asked = 0
    for operation in desk.operations():
        if not _can_be_asked(operation, mode):
            continue

        @fuzzed(EXAMPLES)
        @given(operation.as_strategy(generation_mode=mode))
        def ask(case: AnyCase) -> None:
            nonlocal asked
            asked += 1
            case.validate_response(desk.send(case, desk.admin), checks=CHECKS)

        ask()
    assert asked > 100


@pytest.mark.parametrize("kind", ["none", "bad", "viewer"])
def test_no_operation_is_done_for_who_may_not(desk: Desk, kind: str) -> None:
    headers = {"none": {}, "bad": {"authorization": "Bearer nfo1.nobody"}, "viewer": desk.viewer}[kind]
    last, refused = _last_entry(desk), 0
    for operation in desk.operations():
        needed = need(operation.method.upper(), operation.path)
        if needed is Nobody.OPEN or (kind == "viewer" and needed is OperatorRole.VIEWER):
            continue

        @fuzzed(EXAMPLES_OF_A_STRANGER)
        @given(operation.as_strategy())
        def ask(case: AnyCase) -> None:
            nonlocal refused
            refused += 1
            response = desk.send(case, headers)
            # Whoever fails too often is told to wait.
            expected = {HTTPStatus.FORBIDDEN} if kind == "viewer" else {HTTPStatus.UNAUTHORIZED, 429}
            assert response.status_code in expected, f"{case.operation.label}: {response.status_code}"

        ask()
    assert refused > 20
    assert _changes_since(desk, last) == []


def _can_be_asked(operation: AnyOperation, mode: GenerationMode) -> bool:
    """Say whether there are such requests: nothing can be wrong about a name or bytes that may be any."""
    has_schema = any(body.definition.get("schema") for body in operation.body)
    has_pattern = any("pattern" in parameter.definition["schema"] for parameter in operation.path_parameters)
    return mode is GenerationMode.POSITIVE or has_schema or has_pattern or bool(list(operation.query))


def _last_entry(desk: Desk) -> int:
    entries = httpx.get(f"{desk.url}/api/audit?limit=1", headers=desk.admin).json()["entries"]
    return int(entries[0]["id"]) if entries else 0


def _changes_since(desk: Desk, last: int) -> list[object]:
    """Return what was done after that entry; refusals are no change."""
    entries = httpx.get(f"{desk.url}/api/audit?limit=500", headers=desk.admin).json()["entries"]
    assert len(entries) < 500 or entries[-1]["id"] <= last + 1
    return [entry for entry in entries if entry["id"] > last and entry["outcome"] != "refused"]
