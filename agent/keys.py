"""This node's own WireGuard keys, in a file of their own that only root can read.

As a rule there is one. While it is changed there are two, and their order says how far that has
come: the first is the one that is used, and of two the newer is the one with the higher
generation. A private key leaves this file only for the device that it is for.
What stands opposite: encryption.py changes them; model.WireguardKey is what others are told.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from agent import wholefile
from agent.model import WIREGUARD_KEY, WireguardKey

log = structlog.get_logger()

FILE = "wireguard.json"
PORTS = 2  # a generation's is the first or the second


class Key(msgspec.Struct, frozen=True):
    """One key pair."""

    private: bytes
    generation: int
    created: float  # seconds since the epoch

    @property
    def public(self) -> bytes:
        """The half that others are told, 32 bytes."""
        return X25519PrivateKey.from_private_bytes(self.private).public_key().public_bytes_raw()


class _File(msgspec.Struct):
    node: str  # whose they are: a node that begins anew takes none over
    keys: list[Key]


class WireguardKeys:
    """The keys of one node. Every change is on disk before it is in force."""

    def __init__(self, state_dir: Path, node: str, port: int, clock: Callable[[], float]) -> None:
        """Read what is there. `port` is the first of PORTS that follow each other.

        A file that cannot be read is as none: keys are worth no more than the sessions they
        make, and those are made anew.
        """
        self._path, self._node, self._port, self._clock = state_dir / FILE, node, port, clock
        self._keys: list[Key] = []
        self._public: dict[bytes, Key] = {}
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=_File)
            if found.node == node and all(len(k.private) == WIREGUARD_KEY for k in found.keys):
                self._take(found.keys[:2])
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("wireguard.keys_unreadable", file=str(self._path), error=str(error))

    @property
    def current(self) -> Key | None:
        """The one that is used."""
        return self._keys[0] if self._keys else None

    @property
    def is_changing(self) -> bool:
        """Whether there are two."""
        return len(self._keys) > 1

    @property
    def is_flipped(self) -> bool:
        """Whether of the two the newer is used already."""
        return self.is_changing and self._keys[0].generation > self._keys[1].generation

    def records(self) -> tuple[WireguardKey, ...]:
        """What others are told, the one to use first."""
        return tuple(
            WireguardKey(public, self._port + key.generation % PORTS, key.generation)
            for public, key in self._public.items()
        )

    def private(self) -> dict[bytes, bytes]:
        """Private keys by public ones."""
        return {public: key.private for public, key in self._public.items()}

    def ensure(self) -> None:
        """Have one. OSError if it cannot be kept."""
        if not self._keys:
            self._put([self._make(1)])

    def begin(self) -> None:
        """Have a newer one beside the one that is used. OSError."""
        if not self.is_changing:
            self._put([*self._keys, self._make(self._keys[0].generation + 1)])

    def flip(self) -> None:
        """Use the newer one. OSError."""
        if not self.is_flipped:
            self._put(self._keys[::-1])

    def retire(self) -> None:
        """Forget the older one. OSError."""
        self._put(self._keys[:1])

    def _make(self, generation: int) -> Key:
        private = X25519PrivateKey.generate().private_bytes_raw()
        return Key(private, generation, self._clock())

    def _put(self, keys: list[Key]) -> None:
        """On disk, whole or not at all, and then here."""
        wholefile.replace(self._path, msgspec.json.encode(_File(self._node, keys)))
        self._take(keys)

    def _take(self, keys: list[Key]) -> None:
        self._keys = list(keys)
        self._public = {key.public: key for key in keys}
