"""Templates made into answers that a browser may run nothing of but our own files."""

from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse

from controller.access.model import Caller, OperatorRole
from controller.api.access import caller_of
from controller.dashboard import texts
from controller.dashboard.assets import CHARTS, Assets
from core.clock import Clock

# `data:` images: charts draw heat maps into one.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
# The charting library sets a few style attributes; it makes no style elements, and no page of ours has either.
_CHARTS_POLICY = f"{_POLICY}; style-src-attr 'unsafe-inline'"


class Renderer:
    def __init__(self, assets: Assets, *, clock: Clock, version: str) -> None:
        self._clock = clock
        self._templates = Environment(
            loader=PackageLoader("controller.dashboard"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._templates.filters.update(
            size=texts.size_text,
            duration=texts.duration_text,
            percent=texts.percent_text,
            rate=texts.rate_text,
            instant=texts.instant_text,
            clock=texts.clock_text,
            count=texts.count_text,
            digest=texts.digest_text,
            query=urlencode,
        )
        self._templates.globals.update(asset=assets.url, charts=CHARTS, version=version, NONE=texts.NONE)

    def page(
        self, request: Request, template: str, *, status: int = 200, has_charts: bool = False, **values: Any
    ) -> HTMLResponse:
        """Return a page for whoever is signed in; `values` are what the template names."""
        caller, now = caller_of(request), self._clock.now()
        text = self._templates.get_template(template).render(
            **values,
            now=now,
            ago=lambda then: texts.ago_text(then, now),
            left=lambda then: _left_text(then, now),
            operator=caller.operator,
            may_operate=caller.operator.role >= OperatorRole.OPERATOR,
            csrf_token=_csrf_token(caller),
            path=request.url.path,
        )
        return HTMLResponse(text, status, {"content-security-policy": _CHARTS_POLICY if has_charts else _POLICY})


def _csrf_token(caller: Caller) -> str:
    return "" if caller.session is None else caller.session.csrf_token


def _left_text(then: datetime, now: datetime) -> str:
    return "over" if then <= now else f"in {texts.span_text(then - now)}"
