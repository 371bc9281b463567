"""`python -m edge_agent.identity COMMAND`: the short child process that does cryptography for the running agent.

One JSON object on standard input, one on standard output; bytes that are not text are in base64. Exit code 0: the
answer; 2: not a call that this version knows; 3: a refusal, `{"refusal": reason}`. Keys never stand in arguments, which
every user of the machine can read.
"""

import os
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from datetime import datetime

import orjson

from core.errors import Untrusted
from core.spiffe import parse_spiffe
from edge_agent.identity import keys

# Not 1, with which Python ends after a defect.
ANSWER, NO_CALL, REFUSAL = 0, 2, 3
# Derived: a certificate chain and a bundle of a few kB each, and some.
MAX_BYTES = 256 << 10
# Behind everything that answers a device.
NICENESS = 10


def renewal(body: Mapping[str, str]) -> dict[str, str]:
    """Prove that the holder of `signer` asks for a certificate for `key`; an empty `key` makes a new one."""
    key = body["key"].encode() or keys.new_key()
    csr = keys.certificate_request(key)
    signature = keys.sign_renewal(body["signer"].encode(), nonce=b64decode(body["nonce"]), csr=csr)
    return {"key": key.decode(), "csr": b64encode(csr).decode(), "signature": b64encode(signature).decode()}


def credential(body: Mapping[str, str]) -> dict[str, str]:
    """Check what came back: for our key, with our name, of an authority that is in the bundle."""
    keys.check_bundle(body["bundle"].encode(), now=datetime.fromisoformat(body["now"]))
    validity = keys.check_credential(
        body["chain"].encode(), body["bundle"].encode(), key=body["key"].encode(), peer=parse_spiffe(body["peer"])
    )
    return {"not_before": validity.not_before.isoformat(), "not_after": validity.not_after.isoformat()}


def bundle(body: Mapping[str, str]) -> dict[str, str]:
    """Check that a bundle holds authorities only, at least one of them still valid."""
    keys.check_bundle(body["bundle"].encode(), now=datetime.fromisoformat(body["now"]))
    return {}


COMMANDS: Mapping[str, Callable[[Mapping[str, str]], dict[str, str]]] = {
    "renewal": renewal,
    "credential": credential,
    "bundle": bundle,
}


def main(arguments: list[str]) -> int:
    os.nice(NICENESS)
    content = sys.stdin.buffer.read(MAX_BYTES + 1)
    try:
        command, body = COMMANDS[arguments[0]], orjson.loads(content[:MAX_BYTES])
        code, answer = ANSWER, command(body)
    except Untrusted as refusal:
        code, answer = REFUSAL, {"refusal": str(refusal)}
    except (IndexError, KeyError, ValueError, TypeError) as error:
        code, answer = NO_CALL, {"refusal": f"{arguments}: {type(error).__name__}"}
    sys.stdout.buffer.write(orjson.dumps(answer))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
