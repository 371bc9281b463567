"""The hard examples of one agent as one part: what the composition root makes, runs and shows.

On a disk thread of its own, which starts with the first sample: writing them never waits for a fetch, nor a fetch for
them. An agent that keeps none has no collector; it tells who asks that it keeps none.
"""

from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import randrange

import grpc.aio

from core.clock import Clock
from core.metrics import Registry
from core.samples import NO_SAMPLES, SampleCounts, SampleOrder
from edge_agent.samples.collector import Collector, Permissions
from edge_agent.samples.rules import Rules, Selection
from edge_agent.samples.store import SampleStore, StoreBounds
from edge_agent.samples.uploader import SampleCallsOverGrpc, SampleUploader, UploadTerms
from edge_agent.settings import AgentSettings


class Samples:
    def __init__(self, settings: AgentSettings, folder: Path, channel: grpc.aio.Channel, *, clock: Clock) -> None:
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="samples")
        store = SampleStore(folder, bounds_of(settings))
        keeper = _collector(settings, store, self._disk, clock)
        # Who is offered examples; None: no model's are kept.
        self.collector = keeper if keeps_any(settings) else None
        # What was kept before somebody switched it off still grows old.
        self._keeper = keeper if keeps_any(settings) or folder.is_dir() else None
        self.uploader = SampleUploader(
            SampleCallsOverGrpc(channel),
            store,
            UploadTerms(keeper.permissions.keeps, settings.metered, settings.samples.upload_bytes_per_s or None),
            disk=self._disk,
            clock=clock,
        )

    @property
    def loops(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        """What must run meanwhile, by name."""
        loops = {"samples-upload": self.uploader.run}
        if self._keeper is not None:
            loops["samples-tidy"] = self._keeper.tidy
        if self.collector is not None:
            loops["samples"] = self.collector.run
        return loops

    def counts(self) -> SampleCounts:
        return NO_SAMPLES if self._keeper is None else self._keeper.counts

    def order(self, order: SampleOrder) -> None:
        self.uploader.order(order)

    def counters(self) -> Mapping[str, int]:
        """Return what became of hard examples, for the status file; nothing where none are kept."""
        if (collector := self.collector) is None:
            return {}
        dropped = {f"samples_dropped_{reason}": count for reason, count in sorted(collector.dropped.items())}
        return {"samples_stored": collector.stored, **dropped, "samples_uploaded": self.uploader.uploaded}

    def register(self, registry: Registry) -> None:
        """Add what Prometheus is told of them; nothing where none are kept."""
        if (collector := self.collector) is None:
            return
        registry.tally(
            "nanofleet_samples",
            "Hard examples, by what became of them: stored, or why not.",
            ("outcome",),
            lambda: [(("stored",), collector.stored), *[((word,), n) for word, n in collector.dropped.items()]],
        )
        registry.tally(
            "nanofleet_samples_removed",
            "Samples that left the store: shed for room or age, or damaged.",
            ("cause",),
            lambda: [(("shed",), collector.shed), (("damaged",), collector.damaged)],
        )
        registry.tally(
            "nanofleet_samples_uploaded_bytes",
            "Bytes of samples that went to the controller.",
            (),
            lambda: [((), self.uploader.uploaded_bytes)],
        )
        registry.gauge(
            "nanofleet_samples_kept_bytes", "Bytes of samples on disk.", (), lambda: [((), self.counts().size_bytes)]
        )

    def close(self) -> None:
        self._disk.shutdown()


def keeps_any(settings: AgentSettings) -> bool:
    return settings.samples.enabled or any(model.samples for model in settings.models.values())


def bounds_of(settings: AgentSettings) -> StoreBounds:
    samples = settings.samples
    return StoreBounds(samples.max_bytes, samples.max_samples, samples.max_age_s, samples.reserve_bytes)


def _collector(settings: AgentSettings, store: SampleStore, disk: ThreadPoolExecutor, clock: Clock) -> Collector:
    samples = settings.samples
    chosen = {name: model.samples for name, model in settings.models.items() if model.samples is not None}
    return Collector(
        store,
        Selection(
            Rules(samples.max_below, samples.max_above, samples.max_per_class_per_hour, samples.max_per_hour),
            below=randrange,
        ),
        Permissions(lambda model: chosen.get(model, samples.enabled), samples.keep_site),
        disk=disk,
        clock=clock,
    )
