"""The heavy application on a two-node Ray of this machine.

    python -m tests.support.two_nodes STATE_DIR TLS_DIR HTTP_PORT CONTROLLER

One replica a node; the HTTP ingress is on the head node alone, so killing the other node takes a replica and not the
door. Prints `ready` and the replicas per node; a line on standard input kills the second node, whose end is reported
as `killed`; the end of standard input ends everything. A process of its own, so that the tests' settings (every
warning is an error) do not apply to ray.
"""

import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from controller.heavy.arguments import ApplicationArguments
from controller.heavy.embedded import prepare_session_dir, ray_environment, remove_session_dir, write_token


def main(state_dir: Path, tls_dir: Path, http_port: int, controller: str) -> None:
    os.environ.update(ray_environment(write_token(state_dir)))
    session_dir = prepare_session_dir(state_dir, temporary=Path(tempfile.gettempdir()))
    # Cluster writes its address to <RAY_TMPDIR>/ray, whatever folder its nodes are given.
    os.environ["RAY_TMPDIR"] = str(session_dir.parent)

    import ray
    from ray import serve
    from ray.cluster_utils import Cluster
    from ray.serve.config import HTTPOptions, ProxyLocation

    from controller.heavy import application

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.CRITICAL)
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host="127.0.0.1", port=http_port))
    application.run_application(
        ApplicationArguments(
            controller=controller,
            tls_dir=tls_dir,
            cache_dir=state_dir / "models",
            min_replicas=2,
            max_replicas=2,
            max_replicas_per_node=1,
            cpus_per_replica=0.5,
            export_spans=False,
        )
    )
    print("ready", [len(_replicas(node)) for node in (cluster.head_node, second)], flush=True)
    if sys.stdin.readline():
        (victim,) = _replicas(second)
        cluster.remove_node(second, allow_graceful=False)
        victim.wait(timeout=10)
        print("killed", flush=True)
        sys.stdin.read()
    application.stop_cluster()
    cluster.shutdown()  # type: ignore[no-untyped-call]  # Ray leaves it without annotations
    remove_session_dir(session_dir, state_dir)


def _replicas(node: Any) -> list[psutil.Process]:
    (raylet,) = node.all_processes["raylet"]
    workers = psutil.Process(raylet.process.pid).children()
    return [worker for worker in workers if "ServeReplica" in " ".join(worker.cmdline())]


main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
