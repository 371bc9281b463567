"""How settings are read: one frozen object per process, from a TOML file under the environment, unknown keys refused.

A process subclasses `ProcessSettings`, gives it an `env_prefix`, and calls `load`. `[heavy] port = 8000` in the file
and `<PREFIX>HEAVY__PORT=8000` in the environment are the same setting; the environment wins.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from core.errors import InvalidRequest

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

_WORDS = {"extra_forbidden": "unknown key", "missing": "must be set"}


class Section(BaseModel):
    """A group of settings; the docstring under a field says its meaning and unit."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ProcessSettings(BaseSettings):
    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, env_nested_delimiter="__"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment win over what `load` read from the file."""
        return env_settings, init_settings


Loaded = TypeVar("Loaded", bound=ProcessSettings)


def load(settings: type[Loaded], path: Path | None, *, foreign: tuple[str, ...] = ()) -> Loaded:
    """Return the settings of the TOML file `path` (None: no file) under those of the environment.

    Args:
        foreign: beginnings of variables that bear our prefix and belong to another command.

    Raises:
        InvalidRequest: the file cannot be read, a key is unknown, or a value does not fit; the message names the key
            and the file or variable it stands in.
    """
    from_file = {} if path is None else _read(path)
    prefix = settings.model_config["env_prefix"]
    _refuse_unknown_variables(settings, prefix, foreign)
    try:
        return settings(**from_file)
    except ValidationError as error:
        faults = [
            f"{_source(fault['loc'], path, prefix)}: {'.'.join(map(str, fault['loc']))}: "
            + _WORDS.get(fault["type"], fault["msg"])
            for fault in error.errors(include_url=False, include_context=False)
        ]
        raise InvalidRequest("settings: " + "; ".join(faults)) from error
    except SettingsError as error:
        raise InvalidRequest(f"settings: environment: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"settings: {path}: {error.strerror}; give the path of a TOML file") from error
    except ValueError as error:
        raise InvalidRequest(f"settings: {path}: expected TOML, got an error: {error}") from error


def _refuse_unknown_variables(settings: type[ProcessSettings], prefix: str, foreign: tuple[str, ...]) -> None:
    """Raise for variables with our prefix that name no setting; the library looks only for those that it knows."""
    for variable in sorted(os.environ):
        name = variable.upper()
        if not name.startswith(prefix) or name.startswith(foreign):
            continue
        if name.removeprefix(prefix).split("__")[0].lower() not in settings.model_fields:
            known = ", ".join(settings.model_fields)
            raise InvalidRequest(f"settings: environment variable {variable}: no such setting; known are {known}")


def _source(location: tuple[int | str, ...], path: Path | None, prefix: str) -> str:
    """Say where the value at `location` came from; the environment wins over the file, so it is asked first."""
    present: Mapping[str, str] = {variable.upper(): variable for variable in os.environ}
    for depth in range(len(location), 0, -1):
        variable = prefix + "__".join(map(str, location[:depth])).upper()
        if variable in present:
            return f"environment variable {present[variable]}"
    return "environment" if path is None else str(path)
