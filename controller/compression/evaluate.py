"""How good and how fast a model is: accuracy on labelled samples, latency of single requests.

Runs in the child process. Latency is that of one request at a time on one thread, after warm-up: several rounds, the
median of each round's p50 and p90, so that a disturbance of one round does not show.
"""

from dataclasses import replace
from statistics import median
from time import perf_counter_ns

import numpy as np

from controller.compression.calibrate import fit_cascade
from controller.compression.datasets import Samples, load_samples
from controller.compression.golden import write_golden
from controller.compression.model import CascadeFit, Evaluated, EvaluationTask, ScoreRule
from controller.compression.session import NUMPY_DTYPE, Argument, Session, open_session, run
from core.errors import InvalidModel, InvalidRequest
from core.tensors import Array

# Chosen: together under three seconds for any model up to 100 ms a run, and 2,500 runs for one of microseconds.
ROUNDS = 5
MAX_RUNS_PER_ROUND = 500
MIN_RUNS_PER_ROUND = 5
_ROUND_BUDGET_NS = 300_000_000
_WARM_UP_RUNS = 20
# Samples per run where the model allows it.
_BATCH = 64


def evaluate(task: EvaluationTask) -> Evaluated:
    """Measure the model of `task`.

    Raises:
        InvalidModel: it does not run.
        InvalidRequest: the data does not fit it, or the rule does not fit the data.
    """
    session = open_session(task.bundle)
    found = _measured(session, task)
    if task.golden is None:
        return found
    return replace(found, golden=write_golden(session, task.bundle, task.golden))


def _measured(session: Session, task: EvaluationTask) -> Evaluated:
    if task.dataset is None:
        p50_us, p90_us = _latency_us(session, _made_up(session.get_inputs()))
        return Evaluated(p50_us, p90_us)
    samples = load_samples(task.dataset.path)
    name = require_fit(session.get_inputs(), samples.inputs)
    parts = batches(session.get_inputs()[0], samples.inputs)
    p50_us, p90_us = _latency_us(session, {name: parts[0][:1] if _is_variable(session) else parts[0]})
    outputs = _run_all(session, name, parts)
    names = [output.name for output in session.get_outputs()]
    is_right = _predictions(names, outputs, task.rule) == samples.labels
    fit = None if task.rule is None else _fit(names, outputs, samples, task.rule)
    return Evaluated(p50_us, p90_us, float(is_right.mean()), len(samples), fit)


def require_fit(arguments: list[Argument], inputs: Array) -> str:
    """Return the name of the model's one input.

    Raises:
        InvalidRequest: the model has several inputs, or other ones than the data set's.
    """
    if len(arguments) != 1:
        raise InvalidRequest(f"data set: expected a model with one input, got {len(arguments)}")
    (argument,) = arguments
    expected = NUMPY_DTYPE.get(argument.type)
    if inputs.dtype != expected:
        raise InvalidRequest(f"data set: expected inputs of {argument.type}, got {inputs.dtype}")
    fits = len(argument.shape) == inputs.ndim and all(
        not isinstance(size, int) or size == found
        for size, found in zip(argument.shape[1:], inputs.shape[1:], strict=True)
    )
    if not fits:
        raise InvalidRequest(f"data set: expected inputs of shape {argument.shape}, got {list(inputs.shape)}")
    return argument.name


def batches(argument: Argument, inputs: Array) -> list[Array]:
    """Cut `inputs` to what the model takes at a time: a few samples, or exactly as many as its first dimension says.

    Raises:
        InvalidRequest: that many do not divide the samples.
    """
    size = argument.shape[0] if isinstance(argument.shape[0], int) else _BATCH
    if isinstance(argument.shape[0], int) and len(inputs) % size:
        raise InvalidRequest(f"data set: expected a multiple of the model's batch of {size}, got {len(inputs)} samples")
    return [inputs[start : start + size] for start in range(0, len(inputs), size)]


def _is_variable(session: Session) -> bool:
    return not isinstance(session.get_inputs()[0].shape[0], int)


def _run_all(session: Session, name: str, parts: list[Array]) -> list[Array]:
    """Return every output over all samples."""
    answers = [run(session, {name: part}) for part in parts]
    for answer, part in zip(answers, parts, strict=True):
        if any(np.ndim(output) == 0 or len(output) != len(part) for output in answer):
            raise InvalidModel(f"model: expected outputs with one row for each of {len(part)} samples")
    return [np.concatenate(of_output) for of_output in zip(*answers, strict=True)]


def _predictions(names: list[str], outputs: list[Array], rule: ScoreRule | None) -> Array:
    """Return the class each sample gets: the label output where there is one, else the best score."""
    for output in outputs:
        if output.ndim == 1 and output.dtype == np.int64:
            return output
    scores = [
        output
        for name, output in zip(names, outputs, strict=True)
        if output.ndim == 2 and output.dtype.kind == "f" and (rule is None or name == rule.score_output)
    ]
    if not scores:
        raise InvalidModel("model: expected a label output (N,) int64 or a score output (N, classes) to judge it by")
    predictions: Array = scores[0].argmax(axis=1)
    return predictions


def _fit(names: list[str], outputs: list[Array], samples: Samples, rule: ScoreRule) -> CascadeFit:
    if rule.score_output not in names:
        raise InvalidRequest(f"cascade: expected a score output among {', '.join(names)}, got {rule.score_output!r}")
    scores = outputs[names.index(rule.score_output)]
    return fit_cascade(scores, samples.labels, kind=rule.score_kind, max_error_ratio=rule.max_error_ratio)


def _made_up(arguments: list[Argument]) -> dict[str, Array]:
    """Return inputs of zeros, every variable dimension one: what latency is measured on without data."""
    return {argument.name: _zeros(argument) for argument in arguments}


def _zeros(argument: Argument) -> Array:
    if argument.type not in NUMPY_DTYPE:
        raise InvalidModel(f"model: {argument.name!r}: latency cannot be measured on {argument.type}")
    shape = [size if isinstance(size, int) else 1 for size in argument.shape]
    dtype = NUMPY_DTYPE[argument.type]
    return np.full(shape, "" if dtype is np.object_ else 0, dtype)


def _latency_us(session: Session, inputs: dict[str, Array]) -> tuple[float, float]:
    """Return p50 and p90 in microseconds."""
    run(session, inputs)
    runs = _runs_per_round(session, inputs)
    rounds = [np.percentile(_timed(session, inputs, runs), (50, 90)) for _ in range(ROUNDS)]
    p50_ns, p90_ns = (median(float(of_round[at]) for of_round in rounds) for at in (0, 1))
    return p50_ns / 1000, p90_ns / 1000


def _runs_per_round(session: Session, inputs: dict[str, Array]) -> int:
    """Warm up, and return how many runs fit a round."""
    started = perf_counter_ns()
    done = spent_ns = 0
    while done < _WARM_UP_RUNS and spent_ns < _ROUND_BUDGET_NS:
        run(session, inputs)
        done, spent_ns = done + 1, perf_counter_ns() - started
    return max(MIN_RUNS_PER_ROUND, min(MAX_RUNS_PER_ROUND, _ROUND_BUDGET_NS * done // spent_ns))


def _timed(session: Session, inputs: dict[str, Array], runs: int) -> list[int]:
    times = []
    for _ in range(runs):
        started = perf_counter_ns()
        session.run(None, inputs)
        times.append(perf_counter_ns() - started)
    return times
