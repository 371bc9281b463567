"""Between the values of the features and the bodies of `operator_views`."""

from controller.api import operator_views as views
from controller.fleet.model import AgentView, Deployed, Deployment
from controller.fleet.vitals import SeenVitals
from controller.registry.model import (
    BundleFile,
    CascadeRequest,
    Model,
    ModelVersion,
    Publication,
    PublishRequest,
    Variant,
)
from controller.traces.model import SpanRecord, TraceSummary
from core.digest import Digest
from core.fleet_state import Energy, Position, Problem, Slot, SlotReport, Transfer
from core.ids import ModelName
from core.manifest import Cascade, ScoreKind, Signature

# ---- models -------------------------------------------------------------------------------------------------------


def to_publish_request(body: views.PublishBody) -> PublishRequest:
    return PublishRequest(
        file=_bundle_file(body.file),
        extra_files=tuple(map(_bundle_file, body.extra_files)),
        calibration=None if body.calibration is None else Digest(body.calibration),
        evaluation=None if body.evaluation is None else Digest(body.evaluation),
        recipes=body.recipes,
        max_batch=body.max_batch,
        cascade=None if body.cascade is None else _cascade_request(body.cascade),
        requires=body.requires,
        privacy=body.privacy,
    )


def _bundle_file(body: views.FileBody) -> BundleFile:
    return BundleFile(body.path, Digest(body.digest))


def _cascade_request(body: views.CascadeBody) -> CascadeRequest:
    return CascadeRequest(
        escalate_to=ModelName(body.escalate_to),
        score_output=body.score_output,
        score_kind=ScoreKind(body.score_kind),
        max_error_ratio=body.max_error_ratio,
    )


def publication_view(publication: Publication) -> views.PublicationView:
    return views.PublicationView(
        id=publication.id,
        model=publication.model,
        state=publication.state.value,
        stage=publication.stage,
        done_ratio=publication.done_ratio,
        created_at=publication.created_at,
        updated_at=publication.updated_at,
        version=publication.version,
        problem=_reason_view(publication.problem),
    )


def model_view(model: Model) -> views.ModelView:
    return views.ModelView(name=model.name, created_at=model.created_at, latest_version=model.latest_version)


def version_view(version: ModelVersion) -> views.VersionView:
    return views.VersionView(
        version=version.version,
        created_at=version.created_at,
        variants=tuple(map(_variant_view, version.variants)),
    )


def _variant_view(variant: Variant) -> views.VariantView:
    manifest, measured = variant.manifest, variant.measured
    return views.VariantView(
        variant=variant.variant,
        manifest_digest=variant.manifest_digest,
        parent_digest=manifest.lineage.parent,
        recipe=manifest.lineage.recipe,
        size_bytes=measured.size_bytes,
        latency_p50_us=measured.latency_p50_us,
        latency_p90_us=measured.latency_p90_us,
        accuracy_ratio=measured.accuracy_ratio,
        evaluated_samples=measured.evaluated_samples,
        max_batch=manifest.batching.max_batch,
        inputs=tuple(map(_tensor_view, manifest.inputs)),
        outputs=tuple(map(_tensor_view, manifest.outputs)),
        cascade=None if manifest.cascade is None else _cascade_view(manifest.cascade),
    )


def _tensor_view(signature: Signature) -> views.TensorView:
    return views.TensorView(name=signature.name, datatype=signature.datatype.value, shape=signature.shape)


def _cascade_view(cascade: Cascade) -> views.CascadeView:
    return views.CascadeView(
        escalate_to=cascade.escalate_to,
        score_output=cascade.score_output,
        score_kind=cascade.score_kind.value,
        temperature=cascade.temperature,
        threshold=cascade.threshold,
    )


# ---- fleet --------------------------------------------------------------------------------------------------------


def agent_view(seen: AgentView) -> views.AgentView:
    agent = seen.agent
    return views.AgentView(
        id=agent.agent_id,
        site=agent.site,
        is_online=seen.is_online,
        is_in_sync=agent.is_in_sync,
        software_version=agent.software_version,
        tags=agent.tags,
        first_seen_at=agent.first_seen_at,
        last_seen_at=agent.last_seen_at,
        desired=position_view(agent.desired.position),
        desired_slots=tuple(map(slot_view, agent.desired.slots)),
        applied=position_view(agent.reported.applied),
        slots=tuple(map(_slot_report_view, agent.reported.slots)),
        rejection=_reason_view(agent.rejection),
        usage=None if seen.vitals is None else _usage_view(seen.vitals),
        health=None if seen.vitals is None else _health_view(seen.vitals),
        energy=None if seen.vitals is None else _energy_view(seen.vitals.energy),
    )


def _usage_view(seen: SeenVitals) -> views.UsageView:
    usage = seen.usage
    return views.UsageView(
        answered_edge=usage.answered_edge,
        answered_heavy=usage.answered_heavy,
        refused=usage.refused,
        failed=usage.failed,
        since=seen.since,
        requests_per_s=seen.requests_per_s,
        escalated_ratio=seen.escalated_ratio,
    )


def _health_view(seen: SeenVitals) -> views.AgentHealthView:
    health = seen.health
    return views.AgentHealthView(
        rss_bytes=health.rss_bytes,
        available_bytes=health.available_bytes,
        temperature_c=health.temperature_c,
        load=health.load,
        reported_at=seen.reported_at,
    )


def _energy_view(energy: Energy | None) -> views.EnergyView | None:
    if energy is None:
        return None
    return views.EnergyView(
        method=energy.method.value,
        joules=energy.joules,
        answers=energy.answers,
        watts=energy.watts,
        joules_per_answer=energy.j_per_answer,
        recent_joules_per_answer=energy.recent_j_per_answer,
    )


def deployment_view(deployment: Deployment) -> views.DeploymentView:
    return views.DeploymentView(
        target_kind=deployment.target.kind.value,
        target=deployment.target.name,
        slot=slot_view(deployment.slot),
        created_at=deployment.created_at,
    )


def deployed_view(deployed: Deployed) -> views.DeployedView:
    return views.DeployedView(
        deployment=deployment_view(deployed.deployment),
        agents=tuple(
            views.AffectedAgentView(id=agent_id, position=position_view(desired.position))
            for agent_id, desired in sorted(deployed.agents.items())
        ),
    )


def position_view(position: Position) -> views.PositionView:
    return views.PositionView(epoch=position.epoch, generation=position.generation)


def slot_view(slot: Slot) -> views.SlotView:
    return views.SlotView(
        model=slot.model, version=slot.version, variant=slot.variant, manifest_digest=slot.manifest_digest
    )


def _slot_report_view(report: SlotReport) -> views.SlotReportView:
    return views.SlotReportView(
        slot=slot_view(report.slot),
        phase=report.phase.value,
        stored_bytes=report.stored_bytes,
        total_bytes=report.total_bytes,
        problem=_reason_view(report.problem),
        transfer=None if report.transfer is None else _transfer_view(report.transfer),
    )


def _transfer_view(transfer: Transfer) -> views.TransferView:
    return views.TransferView(
        wire_bytes=transfer.wire_bytes,
        brought_bytes=transfer.brought_bytes,
        saved_bytes=max(0, transfer.brought_bytes - transfer.wire_bytes),
        rate_bytes_per_s=transfer.rate_bytes_per_s,
        same_chunks=transfer.same_chunks,
        raw_chunks=transfer.raw_chunks,
        zstd_chunks=transfer.zstd_chunks,
        difference_chunks=transfer.difference_chunks,
    )


def _reason_view(problem: Problem | None) -> views.ReasonView | None:
    return None if problem is None else views.ReasonView(code=problem.code, message=problem.message)


# ---- traces -------------------------------------------------------------------------------------------------------


def trace_summary_view(summary: TraceSummary) -> views.TraceSummaryView:
    return views.TraceSummaryView(
        trace_id=summary.trace_id,
        root_name=summary.root_name,
        start_us=summary.start_us,
        duration_us=summary.duration_us,
        services=summary.services,
        span_count=summary.span_count,
        has_error=summary.has_error,
    )


def span_view(span: SpanRecord) -> views.SpanView:
    return views.SpanView(
        span_id=span.span_id,
        parent_span_id=span.parent_span_id,
        name=span.name,
        kind=span.kind.value,
        service=span.service,
        instance=span.instance,
        start_us=span.start_us,
        duration_us=span.duration_us,
        is_error=span.is_error,
        attributes=dict(span.attributes),
    )
