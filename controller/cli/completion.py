"""What the shell offers for names when somebody presses tab: asked of the controller, quickly, and never complained of.

Completion has no context of its own: the root's callback does not run, so who we are is taken from what was typed so
far. Whoever presses tab waits, so a controller that does not answer at once offers nothing.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import typer

from controller.cli.client import ControllerClient, Patience
from controller.cli.options import Options, client_for
from core.errors import NanofleetError

# Chosen: what a person takes for immediate, and for a hiccup of the line.
PATIENCE = Patience(connect_s=0.5, read_s=1.5)


def device_names(context: typer.Context, incomplete: str) -> list[str]:
    return _offered(context, incomplete, lambda client: (agent.id for agent in client.agents().agents))


def site_names(context: typer.Context, incomplete: str) -> list[str]:
    return _offered(context, incomplete, lambda client: (agent.site for agent in client.agents().agents))


def model_names(context: typer.Context, incomplete: str) -> list[str]:
    return _offered(context, incomplete, lambda client: (model.name for model in client.models().models))


def variant_names(context: typer.Context, incomplete: str) -> list[str]:
    """Offer the variants of the model that stands before the option."""
    model = str(context.params.get("model") or "").partition(":")[0]
    return _offered(
        context,
        incomplete,
        lambda client: (found.variant for version in client.model(model).versions for found in version.variants),
    )


def operator_names(context: typer.Context, incomplete: str) -> list[str]:
    return _offered(context, incomplete, lambda client: (operator.name for operator in client.operators().operators))


def token_ids(context: typer.Context, incomplete: str) -> list[str]:
    return _offered(context, incomplete, lambda client: (token.id for token in client.tokens().tokens))


def trace_ids(context: typer.Context, incomplete: str) -> list[str]:
    return _offered(
        context,
        incomplete,
        lambda client: (trace.trace_id for trace in client.traces(limit=50, service=None, model=None).traces),
    )


def _offered(context: typer.Context, incomplete: str, ask: Callable[[ControllerClient], Iterable[str]]) -> list[str]:
    try:
        with client_for(_options(context), patience=PATIENCE) as client:
            names = set(ask(client))
    except NanofleetError:
        # The command itself will say what is wrong; in the middle of a line nobody can read it.
        return []
    return sorted(name for name in names if name.startswith(incomplete))


def _options(context: typer.Context) -> Options:
    typed = context.find_root().params
    url = typed.get("controller") or os.environ.get("NANOFLEET_CONTROLLER") or None
    path = typed.get("credential") or os.environ.get("NANOFLEET_CREDENTIAL") or None
    return Options(controller_url=url, credential_path=None if path is None else Path(path))
