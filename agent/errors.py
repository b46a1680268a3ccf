"""Errors for people: what went wrong, why, and what to do about it.

Every room raises these; api/ turns them into gRPC status codes with an ErrorInfo detail,
and cli/ turns those into one line on stderr and an exit status (docs/api.md).
"""

from __future__ import annotations


class VxmeshError(Exception):
    """A failure that a person can act on.

    `what` names the thing that failed, `why` the reason, `fix` the way out (an imperative
    sentence without its full stop; may be empty). `code` is a gRPC status name.
    """

    code = "INTERNAL"
    exit_status = 1

    def __init__(self, what: str, why: str, fix: str = "") -> None:
        super().__init__(what, why, fix)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        text = f"{self.what}: {self.why}"
        return f"{text}. {self.fix}" if self.fix else text


class Invalid(VxmeshError):
    """The request itself is wrong: nothing was changed."""

    code = "INVALID_ARGUMENT"
    exit_status = 2


class NotFound(VxmeshError):
    """No object bears that name, id or prefix."""

    code = "NOT_FOUND"
    exit_status = 4


class Conflict(VxmeshError):
    """Something that exists stands in the way: a name, a MAC, an address, a subnet, a port."""

    code = "ALREADY_EXISTS"
    exit_status = 5


class InUse(VxmeshError):
    """The object cannot go (or change) while others hold it."""

    code = "FAILED_PRECONDITION"
    exit_status = 5


class Exhausted(VxmeshError):
    """There is no more of it: addresses, VNIs, free subnets."""

    code = "RESOURCE_EXHAUSTED"


class Unavailable(VxmeshError):
    """Somebody who is needed does not answer."""

    code = "UNAVAILABLE"


class Timeout(VxmeshError):
    """It did not happen in the time given."""

    code = "DEADLINE_EXCEEDED"


class Unsupported(VxmeshError):
    """This kernel, machine or version of vxmesh cannot do it."""

    code = "UNIMPLEMENTED"


class NoAgent(VxmeshError):
    """No agent answers on the socket."""

    code = "UNAVAILABLE"
    exit_status = 3


class Denied(VxmeshError):
    """Who asks has no right to it."""

    code = "PERMISSION_DENIED"


_BY_CODE: dict[str, type[VxmeshError]] = {
    cls.code: cls
    for cls in (
        Invalid,
        NotFound,
        Conflict,
        InUse,
        Exhausted,
        Timeout,
        Unsupported,
        Unavailable,
        Denied,
    )
}


def from_code(code: str, what: str, why: str, fix: str = "") -> VxmeshError:
    """The error class that stands for a gRPC status name; VxmeshError itself if none does."""
    return _BY_CODE.get(code, VxmeshError)(what, why, fix)
