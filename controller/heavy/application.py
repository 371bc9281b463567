"""The Ray Serve application of the heavy tier, and the local cluster it runs on by default. Alone in importing ray.

    POST /v2/models/{m}[/versions/{v}]/infer   header `serve_multiplexed_model_id: sha256:…`, the manifest's digest
    GET  /v2/health/live, /v2/health/ready

One deployment hosts any registered model. Serve routes a request to a replica that has the model (multiplexing); the
replica fetches, verifies and loads what it has not, batches what waits together, runs ONNX Runtime off its event loop
and answers in the Open Inference Protocol. `traceparent` and `x-deadline-ms` are headers of the request.

On a cluster of your own, whose nodes have nanofleet[heavy] installed and can reach the controller:

    RAY_SERVE_USE_GRPC_BY_DEFAULT=1 RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0 \\
    RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0 \\
    serve run controller.heavy.application:build controller=127.0.0.1:7443 max_replicas=4

with `identity.pem` and `trust.pem` of role heavy in `tls_dir` on every node (`nanofleet authority certify`),
and the controller gets `heavy.url` of the ingress. Keys: controller.heavy.arguments.ApplicationArguments.
"""

import asyncio
import logging
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import Response

from controller.heavy import protocol
from controller.heavy.arguments import ApplicationArguments, ClusterArguments
from controller.heavy.artifacts import GrpcArtifacts
from controller.heavy.followed_tls import FollowedTls
from controller.heavy.model import Answer, HostedModel, Job
from controller.heavy.store import ModelStore
from core.addresses import parse_address
from core.clock import SystemClock
from core.digest import Digest
from core.errors import ModelNotReady, NanofleetError
from core.grpc_transport import CHANNEL_OPTIONS, MUTUAL_TLS_OPTIONS
from core.telemetry import Tracing, TracingSettings
from core.tls_files import read_tls_identity

APPLICATION = "nanofleet-heavy"
# Chosen: a model that just failed to load is not fetched again for every request that asks for it.
_FAILURE_MEMORY_S = 2.0
_MAX_REMEMBERED_FAILURES = 256
_LOGGING = LoggingConfig(log_level="ERROR", enable_access_log=False)


class HeavyModels:
    """One replica: all models that it was asked for, within its bounds."""

    def __init__(self, arguments: ApplicationArguments) -> None:
        self._clock = SystemClock()
        self._threads = arguments.threads
        target = parse_address(arguments.controller)
        artifacts = GrpcArtifacts(partial(_open_channel, str(target), arguments.tls_dir))
        self._store = ModelStore(arguments.cache_dir, artifacts, budget_bytes=arguments.cache_budget_bytes)
        tls = read_tls_identity(arguments.tls_dir)
        # No sampling of its own: the incoming flag decides.
        self._tracing = Tracing(
            "nanofleet-heavy",
            TracingSettings(target if arguments.export_spans else None, sample_ratio=0.0),
            attributes={"service.instance.id": serve.get_replica_context().replica_id.unique_id},
            credentials=tls,
        )
        self._tls = FollowedTls(arguments.tls_dir, self._tracing.follow, shown=tls, clock=self._clock)
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="heavy-load")
        self._runners = ThreadPoolExecutor(arguments.concurrent_runs, thread_name_prefix="heavy-run")
        self._loading: dict[Digest, asyncio.Task[HostedModel]] = {}
        self._failed: dict[Digest, tuple[float, NanofleetError]] = {}
        # What is in memory, without keeping it there: that is Serve's bookkeeping.
        self._loaded: weakref.WeakValueDictionary[Digest, HostedModel] = weakref.WeakValueDictionary()
        self._in_progress = 0
        # Ray's decorators are typed for methods of a class, and these are made from the arguments.
        self._hosted: Any = serve.multiplexed(max_num_models_per_replica=arguments.max_models)(self._loading_function())
        self._batched: Any = serve.batch(
            max_batch_size=arguments.max_batch,
            batch_wait_timeout_s=arguments.batch_wait_ms / 1000,
            max_concurrent_batches=arguments.concurrent_runs,
        )(self._running_function())

    async def __call__(self, request: Request) -> Response:
        self._tls.look()
        return await protocol.respond(request, self._infer, tracing=self._tracing, clock=self._clock)

    async def _infer(self, call: protocol.HeavyCall) -> Answer:
        model = await self._model(call.digest)
        call.require_fit(model.manifest, model.signature)
        job = Job(model, call.feed(), model.signature.wanted(call.request), call.deadline)
        self._in_progress += 1
        try:
            # A request that is alone would wait for companions that do not come.
            alone = self._in_progress == 1 or model.manifest.batching.max_batch == 1
            result: Answer | NanofleetError = (await self._run([job]))[0] if alone else await self._batched(job)
        finally:
            self._in_progress -= 1
        if isinstance(result, NanofleetError):
            raise result
        return result

    async def _run(self, jobs: list[Job]) -> list[Answer | NanofleetError]:
        # Serve splits what waited together by model id, so all jobs here are of one model.
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._runners, jobs[0].model.run, jobs, self._clock)

    def _running_function(self) -> Any:
        async def run_jobs(jobs: list[Job]) -> list[Answer | NanofleetError]:
            return await self._run(jobs)

        return run_jobs

    # ---- loading ------------------------------------------------------------------------------------------------

    async def _model(self, digest: Digest) -> HostedModel:
        """Return the model, loading it when needed. A load goes on when its caller leaves: the next one needs it."""
        if digest in self._loaded:
            hosted: HostedModel = await self._hosted(digest)
            return hosted
        self._refuse_what_just_failed(digest)
        task = self._loading.get(digest)
        if task is None:
            task = asyncio.create_task(self._hosted(digest), name=f"load {digest}")
            self._loading[digest] = task
            task.add_done_callback(lambda done: self._finish_load(digest, done))
        return await asyncio.shield(task)

    def _finish_load(self, digest: Digest, task: asyncio.Task[HostedModel]) -> None:
        del self._loading[digest]
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, NanofleetError):
            if len(self._failed) >= _MAX_REMEMBERED_FAILURES:
                self._failed.pop(next(iter(self._failed)))
            self._failed[digest] = (self._clock.monotonic_s() + _FAILURE_MEMORY_S, error)

    def _refuse_what_just_failed(self, digest: Digest) -> None:
        until_s, error = self._failed.get(digest, (0.0, None))
        if error is not None and self._clock.monotonic_s() < until_s:
            raise type(error)(*error.args)
        self._failed.pop(digest, None)

    def _loading_function(self) -> Any:
        def open_model(digest: Digest) -> HostedModel:
            try:
                manifest, folder = self._store.obtain(digest)
            except OSError as error:
                raise ModelNotReady(f"{digest}: the replica cannot store it: {error}") from error
            return HostedModel(digest, manifest, folder, threads=self._threads)

        async def load(digest: str) -> HostedModel:
            loop = asyncio.get_running_loop()
            model = await loop.run_in_executor(self._loader, open_model, Digest(digest))
            self._loaded[model.digest] = model
            return model

        return load


def _open_channel(target: str, tls_dir: Path) -> grpc.Channel:
    credentials = read_tls_identity(tls_dir).channel_credentials()
    return grpc.secure_channel(target, credentials, options=[*CHANNEL_OPTIONS, *MUTUAL_TLS_OPTIONS])


def build(arguments: ApplicationArguments) -> Application:
    """Return the application, for `serve run` and `serve.run`."""
    deployment: Any = serve.deployment(
        HeavyModels,
        name="HeavyModels",
        ray_actor_options={"num_cpus": arguments.cpus_per_replica},
        max_ongoing_requests=arguments.max_ongoing_requests,
        max_queued_requests=arguments.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        autoscaling_config=AutoscalingConfig(
            min_replicas=arguments.min_replicas,
            initial_replicas=arguments.min_replicas,
            max_replicas=arguments.max_replicas,
            target_ongoing_requests=arguments.target_ongoing_requests,
        ),
        # A replica that hangs is replaced within 15 s; one that died is noticed at once.
        health_check_period_s=5,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=_LOGGING,
    )
    if arguments.max_replicas_per_node is not None:
        deployment = deployment.options(max_replicas_per_node=arguments.max_replicas_per_node)
    application: Application = deployment.bind(arguments)
    return application


def start_cluster(arguments: ClusterArguments, *, session_dir: Path) -> None:
    """Start a Ray of this process's own and run the application on it; returns when it serves.

    Ray ties its processes to this one: when it dies, however it dies, they go.
    """
    ray.init(
        address="local",
        num_cpus=arguments.cpus,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
        configure_logging=True,
        _temp_dir=str(session_dir),
    )
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    bind = parse_address(arguments.bind)
    serve.start(http_options=HTTPOptions(host=bind.host, port=bind.port), logging_config=_LOGGING)
    run_application(arguments.application)


def run_application(arguments: ApplicationArguments) -> None:
    """Run the application on the cluster that this process is connected to; returns when it serves."""
    serve.run(build(arguments), name=APPLICATION, route_prefix="/")


def stop_cluster() -> None:
    """Stop what `start_cluster` started. Never `ray stop`, which ends every Ray of the machine."""
    serve.shutdown()  # type: ignore[no-untyped-call]  # Ray leaves it without annotations
    ray.shutdown()
