"""All targets, by what they are a part of."""

from __future__ import annotations

from tests.fuzz.engine import Target
from tests.fuzz.targets import answers, disk, dns, identity, local, paths, peer, seals, unary

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (peer, seals, unary, identity, local, dns, disk, paths, answers)
    for target in module.TARGETS
}
