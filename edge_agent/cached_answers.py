"""Which answers may be given twice, and to whom: the policy around `runtime.response_cache` (ADR 33).

    place_of(model, request, privacy) → None         not cached: switched off for the model, or of class `device`
                                      → Place.find   the answer that the same variant gave to the same request
                                        Place.keep   takes the answer once there is one

Only final answers of the edge that were sure, or of a model that is never judged, are kept: not what the heavy tier
said, not what should have escalated and could not, nothing that is not finite. A hit tells its caller that somebody has
asked the same before, so answers are kept apart by privacy class and those of class `device` not at all.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from core.digest import Digest
from core.ids import ModelName
from core.open_inference.messages import InferRequest, InferResponse
from core.open_inference.statistics import Duration, ModelStatistics
from core.tensors import Tensor
from edge_agent.answer import Answer
from edge_agent.cascade.policy import Privacy, Reason, Tier
from edge_agent.request_content import Content, content_of
from edge_agent.runtime.pool import LoadedModel
from edge_agent.runtime.response_cache import Kept, ResponseCache
from edge_agent.settings import ModelSettings

_KEPT_REASONS = (Reason.CONFIDENT, Reason.NO_CASCADE)


class CachedAnswers:
    """The caches of the models that have one; each holds answers of one variant."""

    def __init__(self, budgets: Mapping[str, int]) -> None:
        """`budgets` are bytes by name of the model."""
        self._caches = {name: ResponseCache(max_bytes=size_bytes) for name, size_bytes in budgets.items()}
        self._digests: dict[str, str] = {}

    @classmethod
    def of(cls, models: Mapping[str, ModelSettings]) -> "CachedAnswers | None":
        """Return the caches that the settings ask for; None: there are none."""
        budgets = {name: model.cache_bytes for name, model in models.items() if model.cache_bytes}
        return cls(budgets) if budgets else None

    def place_of(self, model: LoadedModel, request: InferRequest, privacy: Privacy) -> "Place | None":
        """Return where the answer to `request` is or will be; None: it is not cached."""
        name = model.manifest.model
        cache = self._caches.get(name)
        if cache is None or privacy is Privacy.DEVICE:
            return None
        if self._digests.get(name) != model.digest:
            cache.clear()
            self._digests[name] = model.digest
        return Place(self, cache, name, (model.digest, privacy.value, *content_of(request)))

    def follow(self, running: Mapping[ModelName, Digest]) -> None:
        """Drop the answers of variants that do not run any more; `running` are digests by name."""
        for name, digest in list(self._digests.items()):
            if running.get(ModelName(name)) != digest:
                self._caches[name].clear()
                del self._digests[name]

    def counted(self, statistics: ModelStatistics) -> ModelStatistics:
        """Return what was counted of a model with its hits and misses."""
        cache = self._caches.get(statistics.name)
        if cache is None:
            return statistics
        return replace(statistics, cache_hit=Duration(cache.hits), cache_miss=Duration(cache.misses))

    def serves(self, name: str, digest: object) -> bool:
        return self._digests.get(name) == digest

    def caches(self) -> Mapping[str, ResponseCache]:
        return self._caches


class Place:
    __slots__ = ("_answers", "_cache", "_key", "_model")

    def __init__(self, answers: CachedAnswers, cache: ResponseCache, model: str, key: Content) -> None:
        self._answers = answers
        self._cache = cache
        self._model = model
        self._key = key

    def find(self, request: InferRequest) -> Answer | None:
        kept = self._cache.find(self._key)
        if kept is None:
            return None
        asked = kept.response
        response = InferResponse(asked.model_name, asked.model_version, asked.outputs, request.id, asked.parameters)
        return Answer(response, Tier.EDGE, kept.reason, kept.confidence, is_cached=True)

    def keep(self, future: "asyncio.Future[Answer]") -> None:
        """Take what became of the request; a callback of its future."""
        if future.cancelled() or future.exception() is not None:
            return
        answer = future.result()
        # A variant that was replaced may still answer what it had begun.
        if _may_be_kept(answer) and self._answers.serves(self._model, self._key[0]):
            self._cache.put(self._key, Kept(_copied(answer.response), answer.reason, answer.confidence))


def _may_be_kept(answer: Answer) -> bool:
    if answer.tier is not Tier.EDGE or answer.reason not in _KEPT_REASONS or not answer.is_final:
        return False
    outputs = [tensor.array for tensor in answer.response.outputs]
    return all(array.dtype.kind != "f" or bool(np.isfinite(array).all()) for array in outputs)


def _copied(response: InferResponse) -> InferResponse:
    """Return the response on arrays of its own: those of an answer are rows of what a whole batch gave."""
    outputs = tuple([Tensor(tensor.name, tensor.datatype, tensor.array.copy()) for tensor in response.outputs])
    for tensor in outputs:
        tensor.array.flags.writeable = False
    return InferResponse(response.model_name, response.model_version, outputs, "", response.parameters)
