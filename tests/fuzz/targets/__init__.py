"""All targets, by what they are a part of."""

from __future__ import annotations

from tests.fuzz.engine import Target
from tests.fuzz.targets import disk, dns, identity, local, peer, unary

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (peer, unary, identity, local, dns, disk)
    for target in module.TARGETS
}
