"""The demo's MQTT broker: mosquitto where it is installed, otherwise the embedded one.

The embedded broker (amqtt) speaks MQTT 3.1.1 only, so with it every client of the demo does.
"""

import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from controller.demo.ports import free_port
from controller.demo.processes import Parts
from core.addresses import Address
from core.errors import Unavailable

# `auto`: mosquitto where it is installed, otherwise the embedded one.
BrokerChoice = Literal["auto", "mosquitto", "embedded"]
START_TIMEOUT_S = 15.0
# Debian installs mosquitto where the path of an ordinary user does not lead.
EXTRA_PATHS = ("/usr/sbin", "/usr/local/sbin")


@dataclass(frozen=True, slots=True)
class Broker:
    name: str
    address: Address
    speaks_v5: bool


def start_broker(parts: Parts, folder: Path, choice: BrokerChoice) -> Broker:
    """Start a broker on a free loopback port and wait until it accepts connections.

    Raises:
        Unavailable: mosquitto was asked for and is not installed, or the broker did not start.
    """
    address = Address("127.0.0.1", free_port())
    program = None if choice == "embedded" else find_mosquitto()
    if program is None and choice == "mosquitto":
        raise Unavailable("mosquitto is not installed (Debian: apt install mosquitto); use --broker embedded")
    if program is None:
        part = parts.start_python("broker", "controller.demo.embedded_broker", str(address))
    else:
        part = parts.start("broker", [program, "-c", str(write_configuration(folder, address))])
    part.wait_for("an open port", lambda: accepts(address), timeout_s=START_TIMEOUT_S)
    return Broker("amqtt" if program is None else "mosquitto", address, speaks_v5=program is not None)


def find_mosquitto() -> str | None:
    return shutil.which("mosquitto") or shutil.which("mosquitto", path=":".join(EXTRA_PATHS))


def write_configuration(folder: Path, address: Address) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mosquitto.conf"
    path.write_text(
        f"listener {address.port} {address.host}\nallow_anonymous true\npersistence false\nset_tcp_nodelay true\n"
    )
    return path


def accepts(address: Address) -> bool | None:
    try:
        socket.create_connection((address.host, address.port), timeout=1.0).close()
    except OSError:
        return None
    return True
