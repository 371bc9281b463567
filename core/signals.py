"""SIGTERM and SIGINT: the first asks for an orderly end, a second one ends the process at once."""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_on_signals() -> Iterator[asyncio.Event]:
    """Yield the event that the first signal sets. Children see our end by their closed standard input."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()

    def handle(received: signal.Signals) -> None:
        if not stopping.is_set():
            stopping.set()
            return
        loop.remove_signal_handler(received)
        signal.signal(received, signal.SIG_DFL)
        os.kill(os.getpid(), received)

    for each in SIGNALS:
        loop.add_signal_handler(each, handle, each)
    try:
        yield stopping
    finally:
        for each in SIGNALS:
            loop.remove_signal_handler(each)
