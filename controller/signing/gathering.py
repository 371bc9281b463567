"""Signatures for many at once: what is asked for while a key is busy is signed in one go when it is free.

A key may be slow or elsewhere, so it is asked on a thread. A hop there costs more than an Ed25519 signature; when a
deployment reaches two thousand agents, they share a handful of hops.
"""

import asyncio

from controller.signing.keys import Signer

# Chosen: some 20 ms of a thread.
MAX_TOGETHER = 256


class GatheringSigner:
    def __init__(self) -> None:
        self._waiting: list[_Caller] = []
        # Held by the caller that has the signatures made; the others queue here.
        self._signing = asyncio.Lock()

    async def sign(self, signer: Signer, content: bytes) -> bytes:
        """Return the signature of `signer` over `content`. Raises what the signer raises."""
        caller = _Caller(signer, content)
        self._waiting.append(caller)
        try:
            async with self._signing:
                if caller.signature is None:
                    await self._sign_waiting()
        finally:
            if caller.signature is None:
                self._waiting.remove(caller)
        assert caller.signature is not None, "signed by us, or by one before us"
        return caller.signature

    async def _sign_waiting(self) -> None:
        """Sign for those in front; if that fails, each of the others tries for itself."""
        together = self._waiting[:MAX_TOGETHER]
        signatures = await asyncio.to_thread(lambda: [caller.signer.sign(caller.content) for caller in together])
        for caller, signature in zip(together, signatures, strict=True):
            caller.signature = signature
        self._waiting = [caller for caller in self._waiting if caller.signature is None]


class _Caller:
    """Compared by identity: the same content may be asked for twice."""

    def __init__(self, signer: Signer, content: bytes) -> None:
        self.signer = signer
        self.content = content
        self.signature: bytes | None = None
