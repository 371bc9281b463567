"""The tree of `nanofleet`'s commands: nothing of the REST without a command, one way of doing the same everywhere."""

import pytest

from controller.api.access_rules import RULES
from tests.support.command_tree import Leaf, fault_of, leaves, root

LEAVES = leaves()
NAMES = {leaf.name for leaf in LEAVES}

# What answers for each endpoint of the REST; a reason where no command does.
COMMANDS = {
    "GET /api/health": "status",
    "GET /api/me": "whoami",
    "GET /api/models": "models list",
    "GET /api/models/{name}": "models show",
    "HEAD /api/blobs/{digest}": "models publish",
    "PUT /api/blobs/{digest}": "models publish",
    "POST /api/models/{name}/versions": "models publish",
    "GET /api/publications/{publication_id}": "models publication",
    "GET /api/agents": "devices list",
    "GET /api/agents/{agent_id}": "devices show",
    "GET /api/agents/{agent_id}/identity": "devices identity",
    "POST /api/agents/{agent_id}/ban": "devices ban",
    "DELETE /api/agents/{agent_id}/ban": "devices unban",
    "GET /api/agents/{agent_id}/events": "devices events",
    "GET /api/usage": "usage",
    "POST /api/agents/{agent_id}/transfers": "devices allow-transfer",
    "GET /api/enrolment-tokens": "tokens list",
    "POST /api/enrolment-tokens": "tokens add",
    "DELETE /api/enrolment-tokens/{token_id}": "tokens remove",
    "GET /api/deployments": "deployments list",
    "PUT /api/deployments": "deploy",
    "GET /api/samples": "samples list",
    "POST /api/models/{name}/sample-pulls": "samples pull",
    "GET /api/sample-pulls": "samples pulls",
    "GET /api/sample-pulls/{pull_id}": "samples fetch",
    "GET /api/sample-pulls/{pull_id}/samples/{agent_id}/{digest}": "samples fetch",
    "DELETE /api/sample-pulls/{pull_id}": "samples drop",
    "GET /api/traces": "traces list",
    "GET /api/traces/{trace_id}": "traces show",
    "GET /api/authority": "authority status",
    "POST /api/authority/rotation": "authority rotate",
    "DELETE /api/authority/{sha256}": "authority drop",
    "POST /api/certificates": "authority certify",
    "GET /api/signing": "signing status",
    "GET /api/signing/root": "signing export-root",
    "GET /api/signing/staged": "signing stage",
    "POST /api/signing/signed": "signing publish",
    "POST /api/signing/rotations": "signing rotate",
    "POST /api/models/{name}/revocations": "signing revoke",
    "GET /api/operators": "operators list",
    "POST /api/operators": "operators add",
    "DELETE /api/operators/{name}": "operators remove",
    "POST /api/operators/{name}/secret": "operators rotate",
    "GET /api/audit": "audit list",
    "GET /api/audit/verification": "audit verify",
    "GET /api/restoration": "controller drift",
    "POST /api/restoration/confirmation": "controller confirm-restore",
}
# For browsers, and for programs that read the contract.
WITHOUT_COMMAND = {"/api/sessions", "/api/sessions/current", "/api/openapi.json"}
# They print no result: one runs, one writes figures to a file that `--output` names, one prints the root itself.
WITHOUT_OUTPUT = {"controller run", "demo", "signing export-root"}
READING = {"list", "show", "status", "whoami", "identity", "publication", "usage", "events"}


def test_every_endpoint_of_the_rest_has_a_command() -> None:
    endpoints = {
        f"{method} {path}"
        for path, methods in RULES.items()
        for method in methods
        if path.startswith("/api/") and path not in WITHOUT_COMMAND
    }

    assert endpoints == COMMANDS.keys()
    assert set(COMMANDS.values()) <= NAMES


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.name)
def test_every_command_that_prints_a_result_prints_it_as_json_too(leaf: Leaf) -> None:
    assert ("--output" in leaf.options and "-o" in leaf.options) is (leaf.name not in WITHOUT_OUTPUT)


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.name)
def test_what_only_reads_can_be_watched(leaf: Leaf) -> None:
    assert ("--watch" in leaf.options) is (leaf.words[-1] in READING)


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.name)
def test_the_help_of_every_command_has_examples_that_are_right(leaf: Leaf) -> None:
    assert leaf.examples
    for example in leaf.examples:
        assert fault_of(example) is None
        assert example.startswith(f"nanofleet {leaf.name}")


def test_the_help_of_the_root_says_the_exit_codes() -> None:
    epilog = root().epilog
    for words in ("0 done", "1 refused or failed", "2 wrong usage", "3 no controller reached", "130 interrupted"):
        assert words in epilog


@pytest.mark.parametrize(
    "line",
    [
        "nanofleet devices lst",
        "nanofleet devices list --colour",
        "nanofleet devices list --output yaml",
        "nanofleet devices show",
        "nanofleet tokens add",
        "nanofleet-agent enrol",
        "nanofleet-agent run --state-dir x",
        "other status",
    ],
)
def test_a_command_line_that_is_wrong_is_found_out(line: str) -> None:
    assert fault_of(line) is not None
