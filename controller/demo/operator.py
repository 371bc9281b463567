"""The demo's operator: types the same commands that a person would, and reads what they answer."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from rich.console import Console

from controller.demo.digits import INPUT
from controller.demo.stack import Controller
from core.errors import Unavailable

COMMAND_TIMEOUT_S = 180.0
# Spans leave the processes once a second, in batches.
TRACE_TIMEOUT_S = 20.0
TRACE_POLL_S = 0.25
# Pictures per request when the large model is asked directly.
BATCH = 32


class Operator:
    def __init__(self, controller: Controller, console: Console) -> None:
        self._controller = controller
        self._console = console

    def run(self, *words: str) -> dict[str, Any]:
        """Run one `nanofleet` command, shown as typed; return its JSON answer.

        Raises:
            Unavailable: the command failed; its own message is the reason.
        """
        self._console.print(f"[bold]$ nanofleet {' '.join(words)}[/]", highlight=False)
        who = ["--credential", str(self._controller.credential)]
        command = [sys.executable, "-m", "controller.cli.app", *who, *words, "--output", "json"]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, timeout=COMMAND_TIMEOUT_S, check=True)
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"nanofleet {words[0]}: expected an end within {COMMAND_TIMEOUT_S:g} s") from error
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"nanofleet {words[0]} failed with exit code {error.returncode}; see above") from error
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def token(self, *, site: str, agent: str) -> str:
        """Return a token that lets this one agent in."""
        return str(self.run("devices", "token", "--site", site, "--agent", agent)["text"])

    def _http(self) -> httpx.Client:
        """Return a client of the controller's HTTP port that says who we are."""
        secret = json.loads(self._controller.credential.read_bytes())["secret"]
        headers = {"authorization": f"Bearer {secret}"}
        return httpx.Client(base_url=self._controller.url, headers=headers, timeout=COMMAND_TIMEOUT_S)

    def ask_directly(self, model: str, pictures: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Ask the gateway for the labels of all pictures, (n, features) float32 -> (n,) int64."""
        labels: list[int] = []
        with self._http() as http:
            for start in range(0, len(pictures), BATCH):
                batch = pictures[start : start + BATCH]
                tensor = {"name": INPUT, "shape": list(batch.shape), "datatype": "FP32", "data": batch.ravel().tolist()}
                response = http.post(f"/v2/models/{model}/infer", json={"inputs": [tensor]})
                if not response.is_success:
                    raise Unavailable(f"{model}: expected an answer, got {response.status_code}: {response.text[:300]}")
                outputs = {output["name"]: output["data"] for output in response.json()["outputs"]}
                labels += outputs["label"]
        return np.array(labels, dtype=np.int64)

    def whole_trace(self, trace_ids: Sequence[str], services: frozenset[str]) -> tuple[str, list[dict[str, Any]]]:
        """Return the first of these traces that has spans of all `services`, once they have arrived.

        Raises:
            Unavailable: none was whole in time.
        """
        give_up_s = time.monotonic() + TRACE_TIMEOUT_S
        with self._http() as http:
            while time.monotonic() < give_up_s:
                for trace_id in trace_ids:
                    spans = self._spans(http, trace_id)
                    if {span["service"] for span in spans} >= services and is_one_tree(spans):
                        return trace_id, spans
                time.sleep(TRACE_POLL_S)
        raise Unavailable(f"expected one trace of {', '.join(sorted(services))} among {len(trace_ids)} escalations")

    def _spans(self, http: httpx.Client, trace_id: str) -> list[dict[str, Any]]:
        response = http.get(f"/api/traces/{trace_id}")
        return response.json()["spans"] if response.is_success else []


def is_one_tree(spans: Sequence[dict[str, Any]]) -> bool:
    """Say whether exactly one span is the root and every other one has its parent among them."""
    known = {span["span_id"] for span in spans}
    roots = [span for span in spans if span["parent_span_id"] is None]
    return len(roots) == 1 and all(span["parent_span_id"] in known for span in spans if span is not roots[0])
