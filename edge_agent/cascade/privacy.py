"""Which privacy class a request has: the strictest of what its model, its device and the request itself say. Pure.

    model    its manifest's `privacy`, and `[models.NAME] privacy` of this agent
    device   `[privacy.devices]`, by the client's name or a shell pattern; `[privacy] default` for all others
    request  the word beside it, and the one within its body

Nothing can lower the class that something else has set. A word that is no class refuses the request.
"""

import fnmatch
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Self

from core.manifest import Manifest
from core.open_inference.messages import InferRequest
from edge_agent.cascade.policy import Privacy, privacy_of, strictest
from edge_agent.settings import AgentSettings

# Chosen: well above a site's devices; one that is forgotten is only matched anew.
_MAX_REMEMBERED = 4096
_WILDCARDS = frozenset("*?[")


class PrivacyRules:
    def __init__(
        self,
        *,
        default: Privacy = Privacy.ANY,
        devices: Mapping[str, Privacy] | None = None,
        models: Mapping[str, Privacy] | None = None,
    ) -> None:
        """`devices` maps names or shell patterns; of several that match, the strictest counts."""
        self._models = dict(models or {})
        self._class_of_device = _matcher(default, devices or {})
        # Compared with on the hot path: most agents have no rules, and nothing to look up.
        self._has_rules = bool(self._models or devices) or default is not Privacy.ANY

    @classmethod
    def of(cls, settings: AgentSettings) -> Self:
        return cls(
            default=Privacy(settings.privacy.default),
            devices={client: Privacy(word) for client, word in settings.privacy.devices.items()},
            models={model: Privacy(each.privacy) for model, each in settings.models.items()},
        )

    def privacy_of(self, request: InferRequest, manifest: Manifest, *, beside: str | None, client: str) -> Privacy:
        """Return the class of `request`; `beside` is the word that came beside it, `client` who asks, "" if unknown.

        Raises:
            Forbidden: a word that it carries is no class.
        """
        within, declared = request.parameters.get("privacy"), manifest.privacy
        if within is None and beside is None and declared is None and not self._has_rules:
            return Privacy.ANY
        said = privacy_of([word for word in (within, beside, declared) if word is not None])
        return strictest(said, self._models.get(manifest.model, Privacy.ANY), self._class_of_device(client))


def _matcher(default: Privacy, devices: Mapping[str, Privacy]) -> Callable[[str], Privacy]:
    exact = {name: privacy for name, privacy in devices.items() if not _WILDCARDS.intersection(name)}
    patterns = [
        (re.compile(fnmatch.translate(pattern)), privacy)
        for pattern, privacy in devices.items()
        if pattern not in exact
    ]

    @lru_cache(_MAX_REMEMBERED)
    def class_of(client: str) -> Privacy:
        found = [privacy for pattern, privacy in patterns if pattern.match(client)]
        if client in exact:
            found.append(exact[client])
        return strictest(*found) if found else default

    return class_of
