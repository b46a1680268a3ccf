"""The words of CNI that the plugin and the agent both use: versions, error codes, the socket.

Nothing but the standard library is imported here: the plugin is started for every container.
Source: CNI specification 1.1, sections 2 and 5. What stands opposite: cni/, api/cni/.
"""

from __future__ import annotations

from typing import Any

TYPE = "vxmesh-cni"  # what a network configuration calls us, and what the executable is called
VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")  # the oldest first
CURRENT = VERSIONS[-1]
SOCKET = "/run/vxmesh/cni.sock"
LINE_MAX = 1 << 20  # bytes of a question or an answer: an attachment's name a line of GC's list

# Codes of the specification.
INCOMPATIBLE = 1
UNSUPPORTED_FIELD = 2
UNKNOWN_CONTAINER = 3
BAD_ENVIRONMENT = 4
IO_FAILURE = 5
UNDECODABLE = 6
BAD_CONFIG = 7
TRY_AGAIN = 11
NOT_AVAILABLE = 50
LIMITED = 51
# Our own, from 100 on.
TAKEN = 100  # the attachment, the interface, an address, a MAC or a port is there already
EXHAUSTED = 101  # no address is left
FAILED = 102
NOT_AS_IT_SHOULD_BE = 103  # CHECK

MESSAGES = {
    INCOMPATIBLE: "Incompatible CNI version",
    UNSUPPORTED_FIELD: "Unsupported field in network configuration",
    UNKNOWN_CONTAINER: "Container unknown or does not exist",
    BAD_ENVIRONMENT: "Invalid necessary environment variables",
    IO_FAILURE: "I/O failure",
    UNDECODABLE: "Failed to decode content",
    BAD_CONFIG: "Invalid network config",
    TRY_AGAIN: "Try again later",
    NOT_AVAILABLE: "The plugin is not available",
    LIMITED: "The plugin is not available, and containers may have limited connectivity",
    TAKEN: "Exists already, or is taken",
    EXHAUSTED: "No address is left",
    FAILED: "Failed",
    NOT_AS_IT_SHOULD_BE: "The attachment is not as it should be",
}


class CniError(Exception):
    """A failure as a runtime is told of it: a code, and what is behind it for people."""

    def __init__(self, code: int, details: str) -> None:
        super().__init__(code, details)
        self.code = code
        self.details = details

    @property
    def message(self) -> str:
        """The short text. The specification wants fields and variables named in it."""
        text = MESSAGES.get(self.code, "Error")
        named = self.code in (UNSUPPORTED_FIELD, BAD_ENVIRONMENT)
        return f"{text}: {self.details}" if named else text

    def to_json(self, version: str) -> dict[str, Any]:
        """An error result of that version."""
        return {
            "cniVersion": version,
            "code": self.code,
            "msg": self.message,
            "details": self.details,
        }
