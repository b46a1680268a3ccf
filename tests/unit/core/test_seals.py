"""Seals by themselves, and replicas that hand records on with them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from agent.core.replica import Delta, Record, Replica
from agent.core.seals import (
    GROUP,
    LEAF,
    RUN,
    SEALS_MAX,
    SPARE,
    Keys,
    Seal,
    Sealer,
    Seals,
    Standing,
    Unproven,
)
from agent.core.session import BATCH
from tests.sim.keys import SimKeys, sealed, sealer_of

BULK = 200


def replica(me: str) -> Replica:
    return Replica(me, sealer_of(me))


def write(origin: Replica, *names: str, value: bytes = b"v") -> None:
    for name in names:
        origin.put(f"e/{name}", value)
    origin.publish(origin.written())


def delta(source: Replica, origin: str, known: int = 0, most: int = BATCH) -> Delta:
    """What `source` would send of `origin` to who has `known`, `most` records at a time."""
    floor = source.floor(origin)
    reset = 0 < known < floor
    base = 0 if reset else known
    records = source.since(origin, base)
    upto, complete = source.version(origin), reset
    if len(records) > most:
        records = records[:most]
        upto, complete = records[-1].version, False
    made = Delta(origin, base, upto, records, floor, reset, complete)
    assert source.prove(made, introduce=True)
    return made


def pass_on(source: Replica, target: Replica, origin: str, most: int = BATCH) -> None:
    while target.version(origin) < source.version(origin):
        made = delta(source, origin, target.version(origin), most)
        assert target.merge(made, source.me) is not None


def names(holder: Replica, origin: str) -> dict[str, bytes]:
    return {record.key: record.value for record in holder.items(origin)}


# -- a seal --


def test_a_leaf_stands_for_one_record_of_one_origin_of_one_cluster() -> None:
    record = Record("e/ab", 7, b"cd")
    keys = SimKeys("a", lambda origin: True)
    leaves = {
        *Sealer("x", keys).leaves("a", [record]),
        *Sealer("y", keys).leaves("a", [record]),
        *Sealer("x", keys).leaves("b", [record]),
        *Sealer("xa", keys).leaves("", [record]),
        *Sealer("x", keys).leaves(
            "a", [Record("e/a", 7, b"bcd"), Record("e/ab", 8, b"cd"), Record("e/ab", 7, b"")]
        ),
    }
    assert len(leaves) == 7
    assert all(len(leaf) == LEAF for leaf in leaves)


@pytest.mark.parametrize("count", [1, GROUP - 1, GROUP, GROUP + 1, RUN - 1, RUN])
def test_a_folded_seal_is_the_same_seal_with_fewer_leaves(count: int) -> None:
    rng = random.Random(count)
    sealer = sealer_of("a")
    leaves = [rng.randbytes(LEAF) for _ in range(count)]
    seal = sealer.make("a", 100, b"".join(leaves))
    for _ in range(20):
        living = sorted(rng.sample(range(100, 100 + count), rng.randint(0, min(3, count))))
        folded = seal.fold(living)
        assert sealer.is_signed("a", folded)
        assert len(folded.leaves) == folded.size()
        for version in range(100, 100 + count):
            whole = seal.leaf(version)
            assert whole == leaves[version - 100]
            assert folded.leaf(version) in ((whole,) if version in living else (whole, b""))
        assert folded.fold(living) == folded
        assert not sealer.is_signed("a", folded._replace(last=folded.last + 1))
        assert not sealer.is_signed("b", folded)
    if count == RUN:
        assert len(seal.fold([130]).leaves) == (RUN // GROUP - 1 + GROUP) * LEAF


def test_the_hash_of_a_group_is_no_leaf() -> None:
    """Else who finds a record for it could slip it in, where eight others were."""
    sealer = sealer_of("a")
    leaves = sealer.leaves("a", [Record(f"e/{n}", n, b"v") for n in range(1, 10)])
    folded = sealer.make("a", 1, b"".join(leaves)).fold([9])
    assert folded.folded == 1
    assert folded.leaf(1) == b""
    shorter = Seal(8, 9, folded.leaves, 0, folded.signature)
    assert not sealer.is_signed("a", shorter)


# -- at the origin --


def test_records_written_one_at_a_time_end_in_long_seals() -> None:
    a = replica("a")
    sizes = []
    for number in range(1000):
        write(a, str(number))
        made = delta(a, "a", number)
        assert len(made.seals) == 1
        sizes.append(len(made.seals[0].leaves))
    assert len(a.all_seals("a")[0]) < 1000 / RUN + 8
    assert sum(sizes) / len(sizes) < 5 * LEAF, "each carried its whole run"


def test_many_records_take_few_signatures() -> None:
    a = replica("a")
    write(a, *map(str, range(10 * RUN)))
    made = delta(a, "a")
    assert [(s.first, s.last) for s in made.seals] == [
        (n * RUN + 1, (n + 1) * RUN) for n in range(10)
    ]
    assert delta(a, "a").seals == made.seals, "they were signed twice"


def test_what_is_overwritten_before_it_was_sealed_leaves_no_leaf() -> None:
    a, b = replica("a"), replica("b")
    write(a, "x", "y", "x")
    pass_on(a, b, "a")
    assert names(b, "a") == {"e/x": b"v", "e/y": b"v"}


# -- handing on --


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_written_goes_from_hand_to_hand(seed: int) -> None:
    rng = random.Random(seed)
    a, chain = replica("a"), [replica(name) for name in "bcd"]
    for _ in range(rng.choice([10, 60])):
        for _ in range(rng.choice([1, 1, 3, BULK])):
            name = f"e/{rng.randrange(rng.choice([5, 500]))}"
            if a.get("a", name) and rng.random() < 0.5:
                a.delete(name)
            else:
                a.put(name, rng.randbytes(3))
        a.publish(a.written() - rng.choice([0, 0, 1]))
        for source, target in zip([a, *chain], chain, strict=False):
            if rng.random() < 0.7:
                pass_on(source, target, "a", rng.choice([1, 7, BATCH]))
        if rng.random() < 0.2:
            a.collect("a", min(r.version("a") for r in chain))
    a.publish(a.written())
    for source, target in zip([a, *chain], chain, strict=False):
        pass_on(source, target, "a")
        if target.doubted:  # only the origin itself can say what is gone
            made = Delta("a", 0, a.version("a"), a.since("a", 0), a.floor("a"), True, True)
            assert a.prove(made)
            target.merge(made, "a")
        assert names(target, "a") == names(a, "a")
        living = len(names(target, "a"))
        assert len(target.all_seals("a")[0]) <= 2 * (living + SPARE)


def test_a_state_from_disk_goes_on_with_its_seals() -> None:
    a, b, c = replica("a"), replica("b"), replica("c")
    write(a, *map(str, range(100)))
    pass_on(a, b, "a")
    records, version = b.since("a", 0), b.version("a")
    again = Replica("b", Sealer("sim", SimKeys("b", lambda origin: True)))
    again.restore_peer("a", records, version, 0, b.seals("a", records, version))
    pass_on(again, c, "a")
    assert len(names(c, "a")) == 100


def test_an_origin_that_was_restarted_seals_anew() -> None:
    a, b, c = replica("a"), replica("b"), replica("c")
    write(a, *map(str, range(70)))
    write(a, "3", value=b"w")
    pass_on(a, b, "a")
    again = replica("a")
    again.restore(a.records("a"), a.written(), 0)
    write(again, "4", value=b"w")
    pass_on(again, b, "a")
    pass_on(b, c, "a", 10)
    assert names(c, "a") == names(again, "a")


def test_old_seals_are_folded_and_dropped() -> None:
    a, b = replica("a"), replica("b")
    write(a, "stays")
    for number in range(5000):
        write(a, "changes", value=b"%d" % number)
        pass_on(a, b, "a")
    for holder in (a, b):
        seals, prunings = holder.all_seals("a")
        assert len(seals) < 2 * SPARE
        assert prunings > 0
    made = delta(b, "a")
    assert [record.key for record in made.records] == ["e/stays", "e/changes"]
    assert sum(len(seal.leaves) for seal in made.seals) < 700


# -- what is refused --


@pytest.fixture
def held() -> tuple[Replica, Delta]:
    """A node that knows `a`, and what an honest relay would send it next."""
    a, relay, target = replica("a"), replica("r"), replica("t")
    write(a, "known")
    pass_on(a, target, "a")
    write(a, *map(str, range(BULK)))
    pass_on(a, relay, "a")
    return target, delta(relay, "a", 1)


def swap(made: Delta, place: int, record: Record) -> Delta:
    records = list(made.records)
    records[place] = record
    return replace(made, records=records)


def test_an_honest_relay_is_believed(held: tuple[Replica, Delta]) -> None:
    target, made = held
    assert len(target.merge(made, "r") or []) == BULK


@pytest.mark.parametrize("place", [0, 100, BULK - 1])
def test_altered_records_are_refused(held: tuple[Replica, Delta], place: int) -> None:
    target, made = held
    key, version, value = made.records[place]
    for record in (
        Record(key, version, value + b"!"),
        Record(key, version, b""),
        Record("e/known", version, value),
    ):
        with pytest.raises(Unproven) as error:
            target.merge(swap(made, place, record), "r")
        assert error.value.reason == "altered"
    moved = replace(made, records=[r._replace(version=r.version - 1) for r in made.records[1:]])
    with pytest.raises(Unproven):
        target.merge(moved, "r")
    assert target.version("a") == 1


def test_seals_of_others_are_refused(held: tuple[Replica, Delta]) -> None:
    target, made = held
    by_the_relay = sealed(replace(made, origin="r", seals=()))
    foreign = Replica("a", Sealer("another cluster", SimKeys("a", lambda origin: True)))
    write(foreign, "known", *map(str, range(BULK)))
    for seals in (by_the_relay.seals, delta(foreign, "a", 1).seals):
        with pytest.raises(Unproven) as error:
            target.merge(replace(made, seals=seals), "r")
        assert error.value.reason == "signature"


def test_more_than_the_seals_show_is_refused(held: tuple[Replica, Delta]) -> None:
    target, made = held
    for claim in (
        replace(made, upto=made.upto + 1),
        replace(made, seals=()),
        replace(made, seals=made.seals[1:]),
        replace(made, floor=made.upto + 1),
        replace(made, records=[], seals=made.seals[:1]),
        replace(made, seals=made.seals * (SEALS_MAX // len(made.seals) + 1)),
        replace(made, base=0, records=[], seals=(), reset=True, complete=True),
    ):
        with pytest.raises(Unproven) as error:
            target.merge(claim, "r")
        assert error.value.reason == "unsealed"
    assert names(target, "a") == {"e/known": b"v"}


def test_what_would_not_be_taken_is_not_looked_at(held: tuple[Replica, Delta]) -> None:
    target, made = held
    target.merge(made, "r")
    assert target.merge(replace(made, seals=()), "r") == []
    assert target.merge(replace(made, base=1000, upto=2000, seals=()), "r") is None


def test_a_seal_is_verified_once(held: tuple[Replica, Delta]) -> None:
    target, made = held
    keys = target.sealer and target.sealer.keys
    assert isinstance(keys, SimKeys)
    keys.verified = 0
    half = replace(made, records=made.records[:100], upto=made.records[99].version)
    half.seals = tuple(s for s in made.seals if s.first <= half.upto)
    target.merge(half, "r")
    target.merge(replace(made, base=half.upto, records=made.records[100:]), "r")
    assert keys.verified == len(made.seals)


def test_who_cannot_check_takes_nothing_and_accuses_nobody(held: tuple[Replica, Delta]) -> None:
    _, made = held
    stranger = replica("s")
    assert stranger.merge(replace(made, base=0, certificate=b""), "r") is None
    assert stranger.merge(replace(made, base=0, certificate=b"garbage"), "r") is None
    assert stranger.merge(replace(made, base=0), "r")


def test_parts_of_two_senders_make_no_whole_state(held: tuple[Replica, Delta]) -> None:
    """Or a relay could put a hole before what the origin ends as a whole."""
    target, made = held
    first = replace(made, base=0, upto=made.records[9].version, records=made.records[9:10],
                    reset=True)  # fmt: skip
    assert target.merge(first, "r") == []
    rest = replace(made, base=first.upto, records=made.records[10:], reset=True, complete=True)
    assert target.merge(rest, "a") is None
    assert names(target, "a") == {"e/known": b"v"}


def test_a_relays_whole_state_takes_nothing_away_until_the_origin_says_so(
    held: tuple[Replica, Delta],
) -> None:
    target, made = held
    whole = replace(made, base=0, reset=True, complete=True)  # without `known`
    assert len(target.merge(whole, "r") or []) == BULK
    assert target.doubted == {"a"}
    assert "e/known" in names(target, "a")
    assert "e/known" not in {record.key for record in target.since("a", 0)}, "nobody is told"
    changes = target.merge(whole, "a")
    assert changes is not None
    assert [(c.key, c.value) for c in changes] == [("e/known", b"")]
    assert not target.doubted


# -- an origin that lies of itself --


def hostile(altered: bool) -> Delta:
    a = replica("a")
    write(a, "x", "y")
    made = delta(a, "a")
    if altered:
        return swap(made, 0, made.records[0]._replace(value=b"other"))
    return replace(made, seals=tuple(s._replace(signature=bytes(64)) for s in made.seals))


@pytest.mark.parametrize("altered", [False, True])
def test_what_an_origin_does_not_stand_for_is_not_passed_on(altered: bool) -> None:
    relay = replica("r")
    told: list[str] = []
    relay.on_false = lambda error: told.append(error.reason)
    assert relay.merge(hostile(altered), "a")
    for _ in range(3):
        made = Delta("a", 0, 2, relay.since("a", 0))
        assert not relay.prove(made)
    assert told == ["altered" if altered else "signature"]


def test_a_true_seal_does_not_clear_a_false_one() -> None:
    seals = Seals()
    one = Seal(1, 2, bytes(range(32)), 0, b"")
    seals.add([one], Standing.FALSE)
    seals.add([one, Seal(1, 4, bytes(range(64)), 0, b"")], Standing.PROVEN)
    assert [held.standing for held in seals.cover([Record("e/x", 1, b"")], 1, 0, 9).held] == [
        Standing.FALSE
    ]


# -- bounds --


def test_a_delta_of_another_takes_so_many_seals_at_most() -> None:
    a, relay, target = replica("a"), replica("r"), replica("t")
    for number in range(3 * SEALS_MAX):  # in each run of versions one that stays
        write(a, f"stays-{number}", *["changes"] * (RUN - 1))
        delta(a, "a", a.version("a") - RUN)
    pass_on(a, relay, "a", 10**6)
    made = delta(relay, "a", 0, 10**6)
    assert SEALS_MAX - 3 <= len(made.seals) <= SEALS_MAX
    assert not made.complete
    assert made.upto == made.records[-1].version
    pass_on(relay, target, "a", 10**6)
    assert names(target, "a") == names(a, "a")


def test_the_protocol_is_what_the_simulator_implements() -> None:
    keys: Keys = SimKeys("a", lambda origin: False)
    assert keys.knows("a")
