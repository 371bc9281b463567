"""The models that this agent runs, by name, and the way a new variant takes the place of the old one.

`load` opens, checks and warms up the new variant beside the running one, then switches in one step; what the old one
still has is answered by the old one before it is closed. A load that fails leaves the running variant alone.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from core.clock import Clock
from core.digest import Digest
from core.errors import InvalidTensor, ModelNotReady, UnknownModel
from core.ids import ModelName
from core.manifest import Manifest
from core.open_inference.messages import InferRequest, InferResponse, ModelMetadata
from core.open_inference.signature import ModelSignature
from core.tensors import Array, Tensor
from edge_agent.cascade.confidence import judge_for
from edge_agent.runtime.batcher import Batcher, JudgeOutputs, QueueBounds, Run
from edge_agent.runtime.session import OnnxModel, RunTime
from edge_agent.runtime.threads import RunThreads, available_cores
from edge_agent.runtime.vitals import Watch
from edge_agent.settings import RuntimeSettings

_log = logging.getLogger(__name__)


class LoadedModel:
    """One variant ready to serve: its manifest, what it takes and gives, and the batcher in front of it."""

    def __init__(
        self,
        manifest: Manifest,
        digest: Digest,
        run: Run,
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
        self._signature = ModelSignature.of(manifest)
        self._run = run
        self._now_s = clock.monotonic_s
        self.batcher = Batcher(
            run,
            name=manifest.model,
            clock=clock,
            max_batch=joint_rows(manifest, settings),
            max_wait_s=settings.max_batch_wait_s,
            run_time=run_time,
            may_run_inline=not _varies_within_a_row(manifest),
            judge=_judge_of(manifest),
            bounds=QueueBounds(max_requests=settings.max_queue),
            threads=threads,
            reply_reserve_s=settings.reply_reserve_s,
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
        """Take note of every run from now on, until the watch is stopped."""
        watch = Watch(
            self._run,
            now_s=self._now_s,
            shares_runs=self.manifest.batching.max_batch > 1,
            on_stop=lambda: self.batcher.run_with(self._run),
        )
        self.batcher.run_with(watch.run)
        return watch

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


class ModelPool:
    """The running models; implements `ModelHost` of `edge_agent.reconcile`."""

    def __init__(self, settings: RuntimeSettings, *, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._models: dict[str, LoadedModel] = {}
        self._loading: set[str] = set()
        self._observers: list[Callable[[], None]] = []
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="model-loader")
        # A run takes as many cores as it has threads inside.
        self._threads = RunThreads(max(1, available_cores() // settings.intra_op_threads))

    async def load(self, manifest: Manifest, digest: Digest, folder: Path) -> None:
        """Load, warm up, switch, then drain and close the variant that ran before.

        Raises:
            InvalidModel: ONNX Runtime does not take it, or it contradicts its manifest.
        """
        self._loading.add(manifest.model)
        try:
            loop = asyncio.get_running_loop()
            model, run_time = await loop.run_in_executor(self._loader, self._open, manifest, folder)
        finally:
            self._loading.discard(manifest.model)
        await self.host(
            LoadedModel(
                manifest,
                digest,
                model.run,
                run_time=run_time,
                settings=self._settings,
                clock=self._clock,
                threads=self._threads,
            )
        )

    async def host(self, model: LoadedModel) -> None:
        """Put a loaded model in the place of the one of its name."""
        previous = self._models.get(model.manifest.model)
        self._models[model.manifest.model] = model
        _log.info("model is running", extra={"model": model.manifest.model, "version": model.version})
        self._notify()
        if previous is not None:
            await self._retire(previous)

    async def unload(self, model: ModelName) -> None:
        previous = self._models.pop(model, None)
        if previous is not None:
            _log.info("model was unloaded", extra={"model": model, "version": previous.version})
            self._notify()
            await self._retire(previous)

    def running(self) -> Mapping[ModelName, Digest]:
        return {ModelName(name): model.digest for name, model in self._models.items()}

    def watch(self, model: ModelName) -> Watch:
        """Return a new watch over the running model of that name.

        Raises:
            UnknownModel: it does not run.
        """
        return self.find(model).watch()

    def models(self) -> Sequence[LoadedModel]:
        return tuple(self._models.values())

    @property
    def queued(self) -> int:
        return sum(model.batcher.queued for model in self._models.values())

    def find(self, name: str, version: str = "") -> LoadedModel:
        """Return the running model of that name; an empty version means whichever runs.

        Raises:
            UnknownModel: no such model, or not that version.
            ModelNotReady: it is being loaded for the first time.
        """
        model = self._models.get(name)
        if model is None:
            if name in self._loading:
                raise ModelNotReady(f"model {name}: is being loaded; try again later")
            raise UnknownModel(f"model {name[:80]!r}: this agent runs {sorted(self._models) or 'no model'}")
        if version and version != model.version:
            raise UnknownModel(f"model {name}: this agent runs version {model.version}, got {version[:80]!r}")
        return model

    def on_change(self, observer: Callable[[], None]) -> None:
        """Call `observer` whenever a model came or went."""
        self._observers.append(observer)

    async def close(self) -> None:
        """Answer what waits, then free every model."""
        for name in list(self._models):
            await self.unload(ModelName(name))
        self._loader.shutdown(wait=False)
        self._threads.close()

    def _open(self, manifest: Manifest, folder: Path) -> tuple[OnnxModel, RunTime]:
        model = OnnxModel(manifest, folder, intra_op_threads=self._settings.intra_op_threads)
        return model, model.warm_up(max_batch=joint_rows(manifest, self._settings))

    def _notify(self) -> None:
        for observer in self._observers:
            observer()

    async def _retire(self, model: LoadedModel) -> None:
        try:
            async with asyncio.timeout(self._settings.drain_timeout_s):
                await model.batcher.drain()
        except TimeoutError:
            _log.warning("a model did not finish its requests in time", extra={"model": model.manifest.model})
        finally:
            model.batcher.close()


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
