"""Kinds of values that settings have, beyond those of `core.settings`."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from core.addresses import BindAddress, LoopbackAddress, parse_address
from core.errors import InvalidRequest


def _dialled(text: str | None) -> str | None:
    if text is not None:
        try:
            parse_address(text)
        except InvalidRequest as error:
            raise ValueError(str(error)) from error
    return text


def none_when_empty(value: object) -> object:
    """Neither TOML nor an environment variable can say None."""
    return None if value == "" else value


OptionalAddress = Annotated[LoopbackAddress | None, BeforeValidator(none_when_empty)]
OptionalBindAddress = Annotated[BindAddress | None, BeforeValidator(none_when_empty)]
OptionalDialledAddress = Annotated[str | None, BeforeValidator(none_when_empty), AfterValidator(_dialled)]
SecondsOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=1)]
OptionalPath = Annotated[Path | None, BeforeValidator(none_when_empty)]
OptionalName = Annotated[str | None, BeforeValidator(none_when_empty)]
