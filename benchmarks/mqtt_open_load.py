"""A load that does not wait for answers: one MQTT 5 device that asks at a rate, whatever becomes of what it asked.

    python -m benchmarks.mqtt_open_load --port 1883 --topic nf/v1/s/infer/a/m --rate 900 --deadline-ms 200 --seconds 30

Requests come as by chance (exponential gaps, seeded), on a plan made beforehand: a generator that waits while it is
kept waiting measures nothing (coordinated omission). Every answer is timed by this process's clock, from just before
its request was sent. Prints one JSON object; see `Outcome`.
"""

import argparse
import json
import random
import select
import time
from dataclasses import asdict, dataclass
from itertools import accumulate
from statistics import quantiles

from benchmarks.mqtt_load import DEADLINE_MS, PLACEHOLDER, Load
from benchmarks.raw_mqtt import PUBLISH, QOS_BITS, acknowledgement

# What is not answered by then never will be.
LINGER_S = 2.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """`in_time_per_s`: answers within the deadline; `late`: answers after it; `refused`: told at once to come again."""

    offered_per_s: float
    in_time_per_s: float
    sent: int
    in_time: int
    late: int
    refused: int
    unanswered: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    # How far the generator fell behind its plan.
    worst_lag_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--rate", type=float, required=True, help="requests per second")
    parser.add_argument("--qos", type=int, choices=(0, 1), default=0)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--deadline-ms", type=int, default=DEADLINE_MS)
    parser.add_argument("--answered-by", required=True, help="model name that every answer has to bear")
    arguments = parser.parse_args()
    load = OpenLoad(
        arguments.port,
        arguments.topic.encode(),
        arguments.qos,
        arguments.answered_by,
        deadline_ms=arguments.deadline_ms,
    )
    print(json.dumps(asdict(load.offer(arguments.rate, arguments.seconds, arguments.deadline_ms / 1000))))


class OpenLoad(Load):
    def offer(self, rate: float, seconds: float, deadline_s: float) -> Outcome:
        """Ask at `rate` for `seconds`, then wait for what is still to come."""
        chance = random.Random(7)
        plan_s = list(accumulate(chance.expovariate(rate) for _ in range(int(rate * seconds))))
        answers_s: list[float] = []
        refused = sent = 0
        worst_lag_s = 0.0
        started_s = time.perf_counter()
        end_s = started_s + plan_s[-1] + deadline_s + LINGER_S
        while (sent < len(plan_s) or self._sent_s) and time.perf_counter() < end_s:
            elapsed_s = time.perf_counter() - started_s
            outgoing = []
            while sent < len(plan_s) and plan_s[sent] <= elapsed_s:
                worst_lag_s = max(worst_lag_s, elapsed_s - plan_s[sent])
                outgoing.append(self._request())
                sent += 1
            if outgoing:
                self._client.send(b"".join(outgoing))
            wait_s = plan_s[sent] - (time.perf_counter() - started_s) if sent < len(plan_s) else 0.1
            if select.select([self._client], [], [], max(0.0, wait_s))[0]:
                refused += self._take_replies(answers_s)
        in_time = sum(took_s <= deadline_s for took_s in answers_s)
        cuts_ms = [cut * 1000 for cut in quantiles(answers_s, n=100)] if len(answers_s) > 1 else [0.0] * 99
        return Outcome(
            offered_per_s=round(sent / plan_s[-1], 1),
            in_time_per_s=round(in_time / plan_s[-1], 1),
            sent=sent,
            in_time=in_time,
            late=len(answers_s) - in_time,
            refused=refused,
            unanswered=len(self._sent_s),
            p50_ms=round(cuts_ms[49], 3),
            p99_ms=round(cuts_ms[98], 3),
            max_ms=round(max(answers_s, default=0.0) * 1000, 3),
            worst_lag_ms=round(worst_lag_s * 1000, 3),
        )

    def _take_replies(self, answers_s: list[float]) -> int:
        """Time the answers that one read brings, and return how many refusals came with them."""
        refused = 0
        acknowledgements = []
        for header, packet in self._client.packets():
            if header & 0xF0 != PUBLISH:
                continue
            if header & QOS_BITS:
                id_at = 2 + int.from_bytes(packet[:2])
                acknowledgements.append(acknowledgement(int.from_bytes(packet[id_at : id_at + 2])))
            # Not decoded: that would take more of a core than the responder leaves.
            found = packet.find(self._run)
            sent_s = self._sent_s.pop(packet[found : found + len(PLACEHOLDER)])
            if b'"outputs"' in packet:
                assert self._answered_by in packet or self._answered_by.replace(b":", b": ") in packet, packet
                answers_s.append(time.perf_counter() - sent_s)
            else:
                refused += 1
        if acknowledgements:
            self._client.send(b"".join(acknowledgements))
        return refused


if __name__ == "__main__":
    main()
