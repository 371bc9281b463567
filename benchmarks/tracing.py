"""The cost of tracing on the hot path: the same agent with tracing off, sampled as it comes, and full.

    python -m benchmarks.tracing --json

Three real agents on one broker (the same model, the same settings but `telemetry`), spans exported over OTLP to a
receiver of this benchmark; one load generator asks them in turns, in another order every round, so that whatever else
the machine does falls on all of them. `off` samples and keeps nothing and has no exporter. `sampled` is the default:
5 % sampled but at most 20 a second, errors, escalations and slow requests kept. Figures: medians over the rounds;
ratios: medians of each round's ratio to `off`.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import permutations
from pathlib import Path
from statistics import median

from benchmarks.hot_path import IN_FLIGHT, MAX_BATCH, SITE, SMALL, START_S, ask, circumstances, span_receiver
from tests.support.edge_models import cascade_to, make_mlp
from tests.support.mosquitto import Mosquitto, running_mosquitto
from tests.support.offline_agent import offline_agent

MODEL = "small"
OFF, SAMPLED, FULL = "off", "sampled", "full"
MODES = (OFF, SAMPLED, FULL)
_ORDERS = tuple(permutations(MODES))

Round = Mapping[str, Mapping[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one measurement")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nanofleet-bench-") as folder:
        figures = measure(Path(folder), rounds=arguments.rounds, seconds=arguments.seconds)
    print(json.dumps(figures) if arguments.json else json.dumps(figures, indent=2))


def measure(folder: Path, *, rounds: int, seconds: float) -> dict[str, object]:
    # Part of every answer is its confidence; the threshold lets all of them stay at the edge.
    model = make_mlp(folder / "model", name=MODEL, sizes=SMALL, max_batch=MAX_BATCH, cascade=cascade_to(threshold=0.0))
    with ExitStack() as stack:
        broker = stack.enter_context(running_mosquitto(folder))
        receiver = stack.enter_context(span_receiver())
        for mode, environment in settings(receiver.address).items():
            stack.enter_context(
                offline_agent(
                    folder / mode, models=[model], broker=broker, agent_id=mode, site=SITE, environment=environment
                )
            )
        time.sleep(START_S)
        raw = [measure_round(broker, seconds, _ORDERS[turn % len(_ORDERS)]) for turn in range(rounds)]
        spans = receiver.spans
    return {**summary(raw), **circumstances(rounds, seconds, spans)}


def settings(endpoint: str) -> Mapping[str, Mapping[str, str]]:
    """Return what the agents differ in."""
    return {
        OFF: {"TELEMETRY__EXPORT": "false", "TELEMETRY__SAMPLE_RATIO": "0", "TELEMETRY__KEEP_PER_S": "0"},
        SAMPLED: {"TELEMETRY__ENDPOINT": endpoint},
        FULL: {"TELEMETRY__ENDPOINT": endpoint, "TELEMETRY__SAMPLE_RATIO": "1"},
    }


def measure_round(broker: Mosquitto, seconds: float, order: Sequence[str]) -> Round:
    """Return p50 at one in flight and requests/s at many, by `{what}_{mode}`."""
    figures: dict[str, Mapping[str, float]] = {}
    for what, in_flight in (("p50", 1), ("rps", IN_FLIGHT)):
        for mode in order:
            figures[f"{what}_{mode}"] = ask(broker, mode, MODEL, in_flight, 0, seconds, answered_by=MODEL)
    return figures


def summary(raw: Sequence[Round]) -> dict[str, object]:
    figures: dict[str, object] = {"benchmark": "tracing"}
    for mode in (SAMPLED, FULL):
        figures[f"p50_ratio_{mode}"] = _ratio(raw, "p50", "p50_ms", mode)
        figures[f"rps_ratio_{mode}"] = _ratio(raw, "rps", "rps", mode)
    for mode in MODES:
        figures[f"p50_ms_{mode}"] = round(median(turn[f"p50_{mode}"]["p50_ms"] for turn in raw), 3)
        figures[f"rps_{mode}"] = round(median(turn[f"rps_{mode}"]["rps"] for turn in raw))
    return figures


def _ratio(raw: Sequence[Round], what: str, unit: str, mode: str) -> float:
    return round(median(turn[f"{what}_{mode}"][unit] / turn[f"{what}_{OFF}"][unit] for turn in raw), 3)


if __name__ == "__main__":
    main()
