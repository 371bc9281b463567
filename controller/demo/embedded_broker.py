"""`python -m controller.demo.embedded_broker HOST:PORT`: an MQTT 3.1.1 broker for machines without mosquitto."""

import asyncio
import logging
import signal
import sys

from core.addresses import parse_address


async def serve(address: str) -> None:
    from amqtt.broker import Broker

    bind = parse_address(address)
    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": str(bind)}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await broker.start()
    await stop.wait()
    await broker.shutdown()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(serve(sys.argv[1]))
