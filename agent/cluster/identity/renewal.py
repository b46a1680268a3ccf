"""PURE: when a certificate is to be renewed, and how soon again after a try that failed."""

from __future__ import annotations

from agent.cluster.identity import authority as ca

RENEW_AT = 2 / 3  # of its life
RETRY_SHARE = 1 / 10  # of what is left of it ...
RETRY_WITHIN = (1.0, 3600.0)  # s; ... but not more often, and not less


def due(certificate: bytes) -> float:
    """When to renew a certificate (DER), in seconds since the epoch."""
    begin, end = ca.begins(certificate), ca.ends(certificate)
    return begin + (end - begin) * RENEW_AT


def pause(certificate: bytes, now: float) -> float:
    """How long to wait after a try that failed, in s: the nearer the end, the shorter."""
    least, most = RETRY_WITHIN
    return min(max((ca.ends(certificate) - now) * RETRY_SHARE, least), most)
