"""One hosted model: its manifest, what it takes and gives, the batcher in front of it, in memory or not.

Requests reach the batcher in either case. Out of memory it holds them, and `admit` tells who brings models in; `warm`
releases them. `cool` puts a new batcher in its place: the old one finishes what it has with the session that is still
there, and what comes from then on waits for the next load. So a session is closed only when nothing can run with it.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from core.clock import Clock
from core.digest import Digest
from core.errors import InvalidTensor
from core.manifest import Manifest
from core.open_inference.messages import InferRequest, InferResponse, ModelMetadata
from core.open_inference.signature import ModelSignature
from core.tensors import Array, Tensor
from edge_agent.cascade.confidence import judge_for
from edge_agent.runtime.batcher import Batcher, JudgeOutputs, QueueBounds, Run
from edge_agent.runtime.outcomes import Shed
from edge_agent.runtime.session import RunTime
from edge_agent.runtime.threads import RunThreads
from edge_agent.runtime.vitals import Watch
from edge_agent.settings import RuntimeSettings

# Told the deadline of a request to a model that is not in memory; raises ModelNotReady when it will not be in time.
WhenCold = Callable[[float], None]


class LoadedModel:
    """One variant that answers here; `run` None: not in memory yet.

    `uses` counts its requests, for whoever decides what stays in memory.
    """

    def __init__(
        self,
        manifest: Manifest,
        digest: Digest,
        run: Run | None,
        *,
        run_time: RunTime,
        settings: RuntimeSettings,
        clock: Clock,
        threads: RunThreads | None = None,
    ) -> None:
        """`threads` None: it does not share them with other models."""
        self.manifest = manifest
        self.digest = digest
        self.version = str(manifest.version)
        self.cascade = manifest.cascade
        self.outputs = tuple(signature.spec() for signature in manifest.outputs)
        self.uses = 0
        self._signature = ModelSignature.of(manifest)
        self._run = run
        self._run_time = run_time
        self._settings = settings
        self._clock = clock
        self._threads = threads
        # What batchers shed that are gone, and those that still finish what they have.
        self._shed_before: Counter[Shed] = Counter()
        self._finishing: list[Batcher] = []
        self._watch: Watch | None = None
        self._when_cold: WhenCold | None = None
        self.batcher = self._new_batcher()

    def admit(self, deadline_s: float) -> None:
        """Count a request that is about to be queued, and have the model brought into memory if it is not there.

        Raises:
            ModelNotReady: it will not be there in time.
        """
        self.uses += 1
        if self._when_cold is not None:
            self._when_cold(deadline_s)

    def tell_when_cold(self, told: WhenCold) -> None:
        """Have `told` hear of requests to this model, which was not in memory yet."""
        self._when_cold = told

    def warm(self, run: Run, run_time: RunTime) -> None:
        """Answer with `run` from now on, first what was held."""
        self._run, self._run_time, self._when_cold = run, run_time, None
        self.batcher.run_with(run if self._watch is None else self._watch.run, run_time)

    def cool(self, when_cold: WhenCold) -> Batcher:
        """Hold what comes from now on, and ask `when_cold` about it; return the batcher that had the model so far.

        Once that one is drained, nothing runs with the session any more, and `forget` lets go of it.
        """
        before, self._when_cold = self.batcher, when_cold
        self.batcher = self._new_batcher(is_cold=True)
        self._finishing.append(before)
        return before

    def forget(self, before: Batcher) -> None:
        """Let go of the session that `before` had, which is drained."""
        self._run = None
        self._finishing.remove(before)
        self._shed_before.update(before.shed)

    def refuse_held(self, why: str, *, after_s: float | None = None) -> None:
        """Tell everybody who waits for the model that it does not come."""
        before, self.batcher = self.batcher, self._new_batcher(is_cold=True)
        before.close(why, after_s=after_s)
        self._shed_before.update(before.shed)

    @property
    def shed(self) -> Mapping[Shed, int]:
        """Count the requests that were not run, by why."""
        shed = self._shed_before.copy()
        for batcher in (*self._finishing, self.batcher):
            shed.update(batcher.shed)
        return shed

    def _new_batcher(self, *, is_cold: bool = False) -> Batcher:
        return Batcher(
            None if is_cold else self._run,
            name=self.manifest.model,
            clock=self._clock,
            max_batch=joint_rows(self.manifest, self._settings),
            max_wait_s=self._settings.max_batch_wait_s,
            run_time=self._run_time,
            may_run_inline=not _varies_within_a_row(self.manifest),
            judge=_judge_of(self.manifest),
            bounds=QueueBounds(max_requests=self._settings.max_queue),
            threads=self._threads,
            reply_reserve_s=self._settings.reply_reserve_s,
        )

    def arrays_of(self, request: InferRequest) -> Sequence[Array]:
        """Return the request's inputs in the model's order.

        Raises:
            InvalidTensor: an input is missing, repeated or does not fit, or an unknown output is asked for.
        """
        self._signature.require(request)
        given = {tensor.name: tensor.array for tensor in request.inputs}
        arrays = [given[name] for name in self._signature.inputs]
        self._require_rows(arrays)
        return arrays

    def response(self, request: InferRequest, outputs: Sequence[Array]) -> InferResponse:
        """Return the response to `request`: the outputs that it asked for, in its order."""
        tensors = {
            spec.name: Tensor(spec.name, spec.datatype, array)
            for spec, array in zip(self.outputs, outputs, strict=True)
        }
        wanted = tuple([tensors[name] for name in self._signature.wanted(request)])
        return InferResponse(self.manifest.model, self.version, wanted, request.id)

    def watch(self) -> Watch:
        """Take note of every run from now on, through all loads, until the watch is stopped."""
        self._watch = Watch(
            self._run_now,
            now_s=self._clock.monotonic_s,
            shares_runs=self.manifest.batching.max_batch > 1,
            on_stop=self._unwatch,
        )
        self._run_through(self._watch.run)
        return self._watch

    def _unwatch(self) -> None:
        self._watch = None
        if self._run is not None:
            self._run_through(self._run)

    def _run_through(self, run: Run) -> None:
        # Out of memory there is nothing to run: the next `warm` sees to it.
        if self._when_cold is None and self._run is not None:
            self.batcher.run_with(run)

    def _run_now(self, inputs: Sequence[Array]) -> Sequence[Array]:
        assert self._run is not None, "drained: nothing runs"
        return self._run(inputs)

    def metadata(self) -> ModelMetadata:
        return ModelMetadata(
            name=self.manifest.model,
            versions=(self.version,),
            platform=self.manifest.platform,
            inputs=tuple(self._signature.inputs.values()),
            outputs=self.outputs,
            properties={"digest": self.digest, "variant": self.manifest.variant},
        )

    def _require_rows(self, arrays: Sequence[Array]) -> None:
        max_batch = self.manifest.batching.max_batch
        if max_batch == 1:
            return
        rows = {array.shape[0] for array in arrays}
        if len(rows) > 1 or not 1 <= arrays[0].shape[0] <= max_batch:
            raise InvalidTensor(f"expected 1 to {max_batch} rows, the same for every input, got {sorted(rows)}")


def joint_rows(manifest: Manifest, settings: RuntimeSettings) -> int:
    """Return how many rows may share a run: the lower of what the model and this agent allow."""
    return min(manifest.batching.max_batch, settings.max_batch)


def _varies_within_a_row(manifest: Manifest) -> bool:
    # Such a model is warmed up with the smallest row there is, which says nothing of the largest.
    return any(-1 in signature.shape[1:] for signature in manifest.inputs)


def _judge_of(manifest: Manifest) -> JudgeOutputs | None:
    if manifest.cascade is None:
        return None
    position = [output.name for output in manifest.outputs].index(manifest.cascade.score_output)
    judge = judge_for(manifest.cascade)
    return lambda outputs: judge(outputs[position])
