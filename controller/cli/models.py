"""`nanofleet models`: publish, list, show."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from controller.api import operator_views as views
from controller.cli import completion
from controller.cli.client import ControllerClient
from controller.cli.examples import examples
from controller.cli.options import client_of, usage_errors
from controller.cli.publish import publish_model
from controller.cli.screen import Output, OutputOption, bytes_text, milliseconds_text, peer_text, ratio_text, show
from controller.cli.watching import WatchOption, present
from core.privacy import PrivacyClass

app = typer.Typer(help="Publish models and look at them.", no_args_is_help=True)

# Chosen: one wrong answer in a hundred among those the edge keeps.
DEFAULT_MAX_ERROR_RATIO = 0.01
FileArgument = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The ONNX file.")]
DataOption = typer.Option(exists=True, dir_okay=False, help="An .npz file with `inputs` and `labels`.")


class Recipe(StrEnum):
    INT8_STATIC = "int8-static"
    INT8_DYNAMIC = "int8-dynamic"
    FP16 = "fp16"


NameArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Name of the model.", autocompletion=completion.model_names)
]


@app.command("list", epilog=examples("nanofleet models list", "nanofleet models list --output json"))
def list_models(context: typer.Context, output: OutputOption = Output.TABLE, watch: WatchOption = False) -> None:
    """List the models."""
    present(context, lambda client, _seen: client.models(), _models, output=output, is_watched=watch)


@app.command("show", epilog=examples("nanofleet models show digits-nano"))
def show_model(
    context: typer.Context, name: NameArgument, output: OutputOption = Output.TABLE, watch: WatchOption = False
) -> None:
    """Show a model's versions and variants with what was measured of them."""

    def look(client: ControllerClient, _seen: views.ModelDetailView | None) -> views.ModelDetailView:
        return client.model(name)

    def draw(found: views.ModelDetailView) -> Table:
        return variants_table(found.name, found.versions)

    present(context, look, draw, output=output, is_watched=watch)


@app.command("publication", epilog=examples("nanofleet models publication 01K4 --watch"))
def show_publication(
    context: typer.Context,
    publication: Annotated[str, typer.Argument(metavar="ID", help="As `models publish` says it.")],
    output: OutputOption = Output.TABLE,
    watch: WatchOption = False,
) -> None:
    """Show how a publish stands, also one that was started elsewhere or whose terminal is gone."""

    def look(client: ControllerClient, seen: views.PublicationView | None) -> views.PublicationView:
        return client.publication(publication, seen_at=None if seen is None else seen.updated_at)

    present(context, look, _publication, output=output, is_watched=watch)


def _publication(found: views.PublicationView) -> Text:
    end = f": {found.problem.message}" if found.problem is not None else ""
    version = f" as version {found.version}" if found.version is not None else ""
    return peer_text(f"{found.model}: {found.state}{version}, {found.stage}, {found.done_ratio:.0%}{end}")


def _models(found: views.ModelsView) -> Table:
    table = Table("model", "latest", "created")
    for model in found.models:
        table.add_row(model.name, str(model.latest_version), f"{model.created_at.astimezone():%Y-%m-%d %H:%M}")
    return table


@app.command(
    "publish",
    epilog=examples(
        "nanofleet models publish digits-large large.onnx",
        "nanofleet models publish digits-nano nano.onnx --recipe int8-static --calibration data.npz "
        "--evaluation data.npz",
        "nanofleet models publish digits-nano nano.onnx --escalate-to digits-large --score-output probabilities",
    ),
)
def publish(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            help="Name of the model; an existing one gets a new version.", autocompletion=completion.model_names
        ),
    ],
    file: FileArgument,
    extra_file: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="External data, a tokenizer, a configuration; may be repeated."),
    ] = None,
    calibration: Annotated[Path | None, DataOption] = None,
    evaluation: Annotated[Path | None, DataOption] = None,
    recipe: Annotated[list[Recipe] | None, typer.Option(help="A variant to make; may be repeated.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="Rows that may share one run.")] = 1,
    escalate_to: Annotated[
        str | None,
        typer.Option(help="The model that answers what this one is unsure of.", autocompletion=completion.model_names),
    ] = None,
    score_output: Annotated[str | None, typer.Option(help="The output with one score per class.")] = None,
    score_kind: Annotated[Literal["logits", "probabilities"], typer.Option(help="What the scores are.")] = (
        "probabilities"
    ),
    max_error_ratio: Annotated[
        float, typer.Option(min=0, max=1, help="Share of wrong answers accepted among those the edge keeps.")
    ] = DEFAULT_MAX_ERROR_RATIO,
    requires: Annotated[
        list[str] | None,
        typer.Option(metavar="TAG", help="A tag that an agent must have, such as arch:x86_64; may be repeated."),
    ] = None,
    privacy: Annotated[
        PrivacyClass | None,
        typer.Option(help="How far the data of requests to it may go, whatever they say themselves."),
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Upload a model, check it, make its variants, measure them."""
    cascade = _cascade(escalate_to, score_output, score_kind=score_kind, max_error_ratio=max_error_ratio)
    with client_of(context) as client:
        version = publish_model(
            client,
            name,
            file=file,
            extra_files=extra_file or [],
            calibration=calibration,
            evaluation=evaluation,
            recipes=tuple(recipe or ()),
            max_batch=max_batch,
            cascade=cascade,
            requires=tuple(requires or ()),
            privacy=privacy,
        )
    show(version, variants_table(name, [version]), output=output)


def variants_table(name: str, versions: Sequence[views.VersionView]) -> Table:
    table = Table("version", title=name, title_justify="left")
    for heading in ("variant", "size", "accuracy", "p50", "p90"):
        table.add_column(heading, no_wrap=True)
    table.add_column("escalates")
    for version in versions:
        for kth, variant in enumerate(version.variants):
            table.add_row(
                str(version.version) if kth == 0 else "",
                variant.variant,
                bytes_text(variant.size_bytes),
                ratio_text(variant.accuracy_ratio),
                milliseconds_text(variant.latency_p50_us),
                milliseconds_text(variant.latency_p90_us),
                _escalation(variant.cascade),
            )
        table.add_section()
    return table


def _escalation(cascade: views.CascadeView | None) -> Text:
    if cascade is None:
        return Text("never", style="dim")
    return Text(f"to {cascade.escalate_to} below {cascade.threshold:.3f}")


def _cascade(
    escalate_to: str | None,
    score_output: str | None,
    *,
    score_kind: Literal["logits", "probabilities"],
    max_error_ratio: float,
) -> views.CascadeBody | None:
    if (escalate_to is None) != (score_output is None):
        raise typer.BadParameter("expected --escalate-to and --score-output together or neither")
    if escalate_to is None or score_output is None:
        return None
    with usage_errors():
        return views.CascadeBody(
            escalate_to=escalate_to, score_output=score_output, score_kind=score_kind, max_error_ratio=max_error_ratio
        )
