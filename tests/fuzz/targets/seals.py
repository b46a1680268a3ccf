"""Deltas of an honest origin as a relay passes them on that would like to change what they say.

Whatever it makes of them, the receiver holds nothing in the origin's name that it has not written.
"""

from __future__ import annotations

import random
from typing import Any

from agent.cluster.codec import Encoder, decode, delta_to_proto
from agent.core.replica import Delta, Record, Replica
from agent.core.seals import SIGNATURE, Seal
from agent.errors import VxmeshError
from agent.model import Endpoint, encode
from agent.rpc import peer_pb2 as pb
from tests.fuzz import world
from tests.fuzz.engine import Target
from tests.fuzz.inputs import frame, number, unframe
from tests.sim.keys import sealed, sealer_of

WRITTEN = 150  # versions: three runs, some of them with little alive


def _write() -> tuple[Replica, dict[int, tuple[str, bytes]]]:
    """The origin, and all that it ever wrote: version -> key and value."""
    origin = Replica(world.PEER, sealer_of(world.PEER))
    wrote: dict[int, tuple[str, bytes]] = {}
    node = world.describe(world.PEER, "h2", 2)
    for at in range(WRITTEN):
        if at % 40 == 0:
            record = origin.put("n/" + world.PEER, encode(node))
        elif at % 7 == 3:
            record = origin.delete(f"e/{at % 30:016x}")
        else:
            address = b"\n\1\1" + bytes([at])
            held = Endpoint(f"{at % 30:016x}", world.NET, f"e{at}", b"\2\1\1\1\1" + bytes([at]),
                            (address,))  # fmt: skip
            record = origin.put("e/" + held.id, encode(held))
        wrote[record.version] = record.key, record.value
        if at % 10 == 9:
            origin.publish(origin.written())
            _made(origin, 0, origin.written())
    return origin, wrote


def _made(origin: Replica, base: int, upto: int) -> Delta:
    """What the origin itself says of base..upto."""
    records = [r for r in origin.since(world.PEER, base) if r.version <= upto]
    made = Delta(world.PEER, base, upto, records, 0, False, False)
    origin.prove(made, introduce=True)
    return made


ORIGIN, WROTE = _write()


def relay(data: bytes) -> None:
    """Messages of THIRD, which is not the origin of what is in them."""
    state = world.bare(world.describe(world.ME, "h1", 1))
    state.replica.sealer = sealer_of(world.ME, lambda origin: origin in world.NODES)
    for each in unframe(data):
        try:
            found = decode(each)
            if isinstance(found, Delta):
                state.merge(found, world.THIRD)
        except VxmeshError:
            continue  # its stream ends; it makes another one
    held = state.replica.records(world.PEER)
    for key, version, value in held:
        assert WROTE.get(version) == (key, value), "a record that its origin never wrote"
    assert state.version(world.PEER) <= WRITTEN
    # What it passes on itself is good for others.
    for known in (0, state.version(world.PEER) // 2):
        again = decode(Encoder().encode(state.delta(world.PEER, known)))
        other = world.bare(world.describe(world.STRANGER, "h4", 4))
        other.replica.sealer = sealer_of(world.STRANGER, lambda origin: origin in world.NODES)
        assert isinstance(again, Delta)
        other.merge(again, world.ME)


def make_relayed(rng: random.Random) -> bytes:
    """For `relay`."""
    found = []
    base = 0
    for _ in range(rng.randrange(1, 4)):
        upto = min(WRITTEN, base + rng.choice((10, 40, 150)))
        made = _made(ORIGIN, base, upto)
        if rng.random() < 0.7:
            _twist(made, rng)
        found.append(pb.PeerMessage(delta=delta_to_proto(made)).SerializeToString())
        base = upto if rng.random() < 0.8 else rng.randrange(WRITTEN)
    return frame(found)


def _twist(made: Delta, rng: random.Random) -> None:
    """Change what a delta says."""
    records = made.records = list(made.records)
    at = rng.randrange(len(records)) if records else 0
    match rng.randrange(12):
        case 0 if records:
            records[at] = records[at]._replace(value=records[rng.randrange(len(records))].value)
        case 1 if records:
            records[at] = records[at]._replace(version=records[at].version + 1)
        case 2 if records:
            records[at] = records[at]._replace(key="e/" + "f" * 16)
        case 3:
            records.append(Record("e/" + "f" * 16, made.upto + 1, b"\x90"))
            made.upto += 1
        case 4:
            made.upto += rng.choice((1, 64, 1 << 40))
        case 5:
            made.floor = number(rng, 9)
        case 6:
            made.reset, made.complete = True, rng.random() < 0.5
        case 7:
            made.seals = made.seals[: rng.randrange(len(made.seals) + 1)]
        case 8 if made.seals:
            seal = rng.choice(made.seals)
            changes: dict[str, Any] = {
                "first": seal.first + 1,
                "last": seal.last - 1,
                "folded": number(rng, 8),
                "leaves": seal.leaves[::-1],
                "signature": bytes(SIGNATURE),
            }
            field = rng.choice(list(changes))
            made.seals = (*made.seals[1:], seal._replace(**{field: changes[field]}))
        case 9:
            made.origin = rng.choice(world.NODES)
        case 10:
            # Sealed as it should be, by another one.
            own = sealed(Delta(world.THIRD, 0, 1, [Record("e/" + "f" * 16, 1, b"\x90")]))
            made.seals = (*made.seals, *own.seals)
            records.append(Record("e/" + "f" * 16, made.upto + 1, b"\x90"))
        case _:
            made.seals = (Seal(1, 8, bytes(128), 0, bytes(SIGNATURE)), *made.seals)


TARGETS = [Target("peer.seals", relay, make_relayed, ())]
