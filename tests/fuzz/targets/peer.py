"""What comes on the streams of peers: messages, sessions, records, rumours."""

from __future__ import annotations

import random

from agent.cluster.codec import Encoder, Rumours, decode, delta_to_proto, encode_rumours
from agent.core.membership import Membership, Rumour, State
from agent.core.plumtree import Mesh
from agent.core.probing import Outcome
from agent.core.replica import Delta, Record
from agent.core.session import Session
from agent.core.tuning import PRESETS
from agent.errors import Invalid, VxmeshError
from agent.plan import Plan
from agent.rpc import peer_pb2 as pb
from agent.views import Change
from tests.fuzz import world
from tests.fuzz.engine import Target
from tests.fuzz.inputs import frame, unframe
from tests.fuzz.shapes import message


def make_message(rng: random.Random) -> bytes:
    """A peer's message."""
    if rng.random() < 0.4:
        return make_delta(rng)
    return message(pb.PeerMessage, rng, world.KNOWN).SerializeToString()


def make_delta(rng: random.Random) -> bytes:
    """A delta of records that a member may write."""
    found = world.records(rng, rng.choice((1, 2, 2, 2)))
    base = rng.choice((0, 1, 1))
    made = Delta(
        rng.choice(world.NODES), base, found[-1].version + rng.choice((0, 0, 1)), found,
        rng.choice((0, 0, 1, 2)), rng.random() < 0.2, rng.random() < 0.5,
    )  # fmt: skip
    return pb.PeerMessage(delta=delta_to_proto(made)).SerializeToString()


def read_message(data: bytes) -> None:
    """The codec alone. What it took it must be able to say again."""
    found = decode(data)
    encoded = encode_rumours(found) if isinstance(found, Rumours) else Encoder().encode(found)
    assert decode(encoded) == found


def receive(data: bytes) -> None:
    """Messages of two peers at one node, a frame for one and the next for the other."""
    state = world.make()
    plan = Plan(state)
    relays = len(data) % 2 == 1
    mesh = Mesh(state.me, lambda: relays, lambda: [world.ME, world.PEER])
    sessions = [world.session(state, id, mesh) for id in (world.PEER, world.THIRD)]
    changes: list[Change] = []
    state.listeners.append(changes.append)
    now = 0.0
    for number, each in enumerate(unframe(data)):
        now += (0.0, 0.05, 0.3, 2.0)[len(each) % 4]
        try:
            found = decode(each)
            if not isinstance(found, Rumours):
                sessions[number % 2].receive(found, now)
        except VxmeshError:
            pass  # the stream ends; the next one goes on
        for session in sessions:
            said(session, now)
    for change in changes:
        plan.touched(change)
    world.look(state, plan)


def said(session: Session, now: float) -> None:
    """What a session sends after hostile messages must be good for others."""
    encoder = Encoder()
    for number, each in enumerate(session.to_send(now)):
        decode(encoder.encode(each))
        assert number < 1000, "it never ends"


def take_records(data: bytes) -> None:
    """Values of records, a frame each: the first byte chooses the key, the rest is the value."""
    state = world.make()
    plan = Plan(state)
    changes: list[Change] = []
    state.listeners.append(changes.append)
    keys = [kind + id for kind, ids in world.IDS.items() for id in dict.fromkeys(ids)]
    versions = dict.fromkeys(world.NODES, 1)
    for each in unframe(data):
        if not each:
            continue
        origin = world.NODES[1:][each[0] >> 6]
        version = versions[origin] = versions[origin] + 1
        record = Record(keys[(each[0] & 63) % len(keys)], version, each[1:])
        state.merge(world.delta(origin, [record], version - 1))
    for change in changes:
        plan.touched(change)
    world.look(state, plan)
    state.replica.publish(state.replica.written())
    decode(Encoder().encode(world.delta(state.me, state.since(state.me, 0))))


def make_records(rng: random.Random) -> bytes:
    """For `take_records`."""
    keys = [kind + id for kind, ids in world.IDS.items() for id in dict.fromkeys(ids)]
    return frame(
        bytes([rng.randrange(4) << 6 | keys.index(record.key)]) + record.value
        for record in world.records(rng)
    )


def spread_rumours(data: bytes) -> None:
    """Rumours, answers and time, at a membership of four. What it says then is good for others."""
    rng = random.Random(len(data))
    membership = Membership(world.ME, 1 << 20, PRESETS["lan"], rng, 0.0)
    nodes = [world.PEER, world.THIRD, world.STRANGER]
    for node in nodes:
        membership.add(node, 0.0, 1 << 20)
    now = 0.0
    probes: list[int] = []
    for each in unframe(data):
        step = each[0] if each else 0
        now += (0.0, 0.01, 0.2, 1.0, 30.0)[step % 5]
        try:
            found = decode(each[1:])
        except Invalid:
            found = Rumours()
        if isinstance(found, Rumours):
            membership.receive(found, now, table=step % 2 == 0)
        match step % 7:
            case 0 if probes:
                membership.acked(probes.pop(), step << 18, now)
            case 1 if probes:
                membership.refused(probes.pop(), now)
            case 2 if probes:
                membership.answered(probes[-1], nodes[step % 3], Outcome.SILENT, now)
            case 3:
                membership.heard(nodes[step % 3], step << 17, now)
        membership.handle_timer(now)
        probes += [action.seq for action in membership.actions() if hasattr(action, "seq")]
        del probes[:-8]
        membership.gossip(now, nodes)
        membership.transitions()
        decode(encode_rumours(membership.table()))
        decode(encode_rumours(membership.piggyback(nodes[step % 3])))
    assert membership.state(world.ME) is State.ALIVE
    assert len(membership.table()) < 1000


def make_rumours(rng: random.Random) -> bytes:
    """For `spread_rumours`."""

    def some() -> bytes:
        if rng.random() < 0.3:
            made = message(pb.Rumours, rng, world.KNOWN)
            return pb.PeerMessage(rumours=made).SerializeToString()
        rumours = [
            Rumour(
                rng.choice((*world.NODES, *world.TEXTS_AS_NODES)),
                rng.choice(world.KNOWN.of("incarnation")) + rng.randrange(3),
                rng.choice(list(State)),
                rng.choice(world.NODES),
            )
            for _ in range(rng.randrange(1, 5))
        ]
        return encode_rumours(rumours)

    return frame(bytes([rng.randrange(256)]) + some() for _ in range(rng.randrange(1, 12)))


def make_session(rng: random.Random) -> bytes:
    """For `receive`."""
    return frame(make_message(rng) for _ in range(rng.randrange(1, 8)))


TARGETS = [
    Target("peer.message", read_message, make_message, (Invalid,), weight=3),
    Target("peer.session", receive, make_session, ()),
    Target("peer.records", take_records, make_records, ()),
    Target("peer.rumours", spread_rumours, make_rumours, (), weight=2),
]
