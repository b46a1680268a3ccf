"""What is free: examples, and everything against a plain set of addresses."""

from __future__ import annotations

import ipaddress
import random
import time
from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.space import Space
from agent.notation import format_address, parse_address

T = TypeVar("T")


def number(text: str) -> int:
    return int(ipaddress.ip_address(text))


def whole(cidr: str) -> list[tuple[int, int]]:
    subnet = ipaddress.ip_network(cidr)
    return [(int(subnet.network_address), int(subnet.broadcast_address))]


def v4(value: int) -> bytes:
    return value.to_bytes(4)


BASE = number("10.0.0.0")
ALL = whole("10.0.0.0/24")


@pytest.fixture
def space() -> Space:
    return Space(["10.0.0.0/24"], [parse_address("10.0.0.1")], ())


class TestMarks:
    @given(
        st.lists(
            st.one_of(
                st.integers(0, 600).map(lambda n: v4(BASE + n)),
                st.integers(0, 9).map(lambda n: bytes(15) + bytes([n])),
                st.just(b"odd"),
            )
        ),
        st.lists(st.integers(0, 600).map(lambda n: v4(BASE + n))),
    )
    def test_many_are_taken_as_one_by_one(self, many: list[bytes], before: list[bytes]) -> None:
        spaces = []
        for together in (True, False):
            space = Space(["10.0.0.0/22", "::/64"], [], "")
            for address in before:
                space.take(address)
            assert len(list(space.used_between(BASE, BASE + 1023, 4))) == len(set(before))
            if together:
                space.take_all(many)
            else:
                for address in many:
                    space.take(address)
            families = space._families.values()
            found = list(space.used_between(BASE, BASE + 1023, 4))
            spaces.append((found, [(f.used, f.more) for f in families]))
        assert spaces[0] == spaces[1]

    def test_taken_until_released(self, space: Space) -> None:
        a = parse_address("10.0.0.9")
        assert not space.used(a)
        space.take(a)
        assert space.used(a)
        assert not space.used(parse_address("10.0.0.8"))
        space.release(a)
        assert not space.used(a)

    def test_as_many_releases_as_takes(self, space: Space) -> None:
        a = parse_address("10.0.0.9")
        for _ in range(3):
            space.take(a)
        for _ in range(2):
            space.release(a)
            assert space.used(a)
        space.release(a)
        assert not space.used(a)
        space.release(a)  # nobody's: nothing happens
        space.take(a)
        space.release(a)
        assert not space.used(a)

    def test_reserved(self, space: Space) -> None:
        got = [n for n in range(256) if space.reserved(v4(BASE + n))]
        assert got == [0, 1, 255]

    def test_reserved_in_ipv6(self) -> None:
        space = Space(["fd00::/64"], [parse_address("fd00::1")], ())
        assert space.reserved(parse_address("fd00::"))
        assert space.reserved(parse_address("fd00::1"))
        assert not space.reserved(parse_address("fd00::2"))
        assert not space.reserved(parse_address("fd00::ffff:ffff:ffff:ffff"))

    def test_families_are_kept_apart(self) -> None:
        space = Space(["10.0.0.0/24", "::/96"], [], ())
        space.take(parse_address("10.0.0.9"))
        assert not space.used((BASE + 9).to_bytes(16))
        space.take((BASE + 8).to_bytes(16))
        assert not space.used(parse_address("10.0.0.8"))

    @pytest.mark.parametrize("odd", [b"", b"\x0a\x00\x00", bytes(5), bytes(17)])
    def test_what_is_no_address_is_ignored(self, space: Space, odd: bytes) -> None:
        space.take(odd)
        assert not space.used(odd)
        assert not space.reserved(odd)
        space.release(odd)
        assert space.usage(4) == (253, 0)

    def test_used_between(self, space: Space) -> None:
        for n in (3, 7, 200):
            space.take(v4(BASE + n))
        space.take(parse_address("10.9.0.1"))

        def between(low: int, high: int) -> list[int]:
            return [n - BASE for n in space.used_between(BASE + low, BASE + high, 4)]

        assert between(0, 255) == [3, 7, 200]
        assert between(3, 7) == [3, 7]
        assert between(4, 6) == between(8, 199) == []
        assert between(7, 200) == [7, 200]
        assert list(space.used_between(0, 255, 6)) == []

    def test_usage(self, space: Space) -> None:
        assert space.usage(4) == (253, 0)
        for n in (1, 9, 9, 10):  # the gateway's is no dynamic address
            space.take(v4(BASE + n))
        assert space.usage(4) == (253, 2)
        assert space.usage(6) == (0, 0)
        assert Space(["fd00::/64"], [parse_address("fd00::1")], ()).usage(6) == (2**64 - 2, 0)

    def test_usage_counts_the_dynamic_range_only(self) -> None:
        space = Space(["10.0.0.0/24", "fd00::/120"], [], ["10.0.0.128/26"])
        space.take(parse_address("10.0.0.5"))
        space.take(parse_address("10.0.0.130"))
        assert space.usage(4) == (64, 1)
        assert space.usage(6) == (255, 0)  # a range of one family does not bind the other


class TestPick:
    def test_in_turn_and_not_the_reserved(self, space: Space) -> None:
        got = [space.pick(ALL, 4) for _ in range(3)]
        assert got == [v4(BASE + n) for n in (2, 3, 4)]

    def test_what_was_released_waits_for_its_turn(self, space: Space) -> None:
        first = space.pick(ALL, 4)
        assert first is not None
        space.take(first)
        space.release(first)
        picked = []
        for _ in range(253):
            found = space.pick(ALL, 4)
            assert found is not None
            space.take(found)
            picked.append(found)
        assert picked[-1] == first
        assert space.pick(ALL, 4) is None
        space.release(v4(BASE + 77))
        assert space.pick(ALL, 4) == v4(BASE + 77)

    def test_only_what_is_owned(self, space: Space) -> None:
        owned = [(BASE + 0, BASE + 2), (BASE + 40, BASE + 40), (BASE + 254, BASE + 255)]
        got = []
        while (found := space.pick(owned, 4)) is not None:
            space.take(found)
            got.append(int.from_bytes(found) - BASE)
        assert got == [2, 40, 254]
        assert space.pick([], 4) is None
        assert space.pick(owned, 6) is None

    def test_only_from_the_dynamic_range(self) -> None:
        space = Space(["10.0.0.0/24"], [], ["10.0.0.64/30"])
        got = []
        while (found := space.pick(ALL, 4)) is not None:
            space.take(found)
            got.append(int.from_bytes(found) - BASE)
        assert got == [64, 65, 66, 67]
        assert space.largest_free(ALL, 4) is None

    def test_the_first_subnet_until_it_is_full_and_then_the_second(self) -> None:
        space = Space(["10.9.0.0/29", "10.0.0.0/30", "10.4.0.0/24"], [], ())
        owned = [(number("10.0.0.0"), number("10.9.255.255"))]
        got = []
        for _ in range(9):
            found = space.pick(owned, 4)
            assert found is not None
            space.take(found)
            got.append(found)
        first = [f"10.9.0.{n}" for n in range(1, 7)]
        assert got == [parse_address(a) for a in [*first, "10.0.0.1", "10.0.0.2", "10.4.0.1"]]
        space.release(parse_address("10.9.0.3"))
        assert space.pick(owned, 4) == parse_address("10.9.0.3"), "the first has one again"

    def test_what_is_donated_is_of_the_first_subnet_that_has_some(self) -> None:
        space = Space(["10.9.0.0/29", "10.0.0.0/16"], [], ())
        owned = [*whole("10.0.0.0/16"), *whole("10.9.0.0/29")]
        assert space.offer(owned, 4) == (number("10.9.0.4"), number("10.9.0.6"))
        for n in range(1, 7):
            space.take(parse_address(f"10.9.0.{n}"))
        run = space.offer(owned, 4)
        assert run and run[1] == number("10.0.255.254")

    def test_ranges_of_each_family_and_of_several_subnets(self) -> None:
        ranges = ["10.4.0.8/30", "10.9.0.4/31", "fd00::10/126"]
        space = Space(["10.9.0.0/29", "10.4.0.0/24", "fd00::/64", "fd01::/64"], [], ranges)
        owned = [*whole("10.4.0.0/24"), *whole("10.9.0.0/29")]
        got = []
        while (found := space.pick(owned, 4)) is not None:
            space.take(found)
            got.append(format_address(found))
        assert got == [*(f"10.9.0.{n}" for n in (4, 5)), *(f"10.4.0.{n}" for n in (8, 9, 10, 11))]
        assert space.pick(whole("fd00::/64"), 6) == parse_address("fd00::10")
        assert space.pick(whole("fd01::/64"), 6) is None
        assert (space.usage(4), space.usage(6)) == ((6, 6), (4, 0))

    def test_a_range_outside_the_subnets_gives_nothing(self) -> None:
        space = Space(["10.0.0.0/24"], [], ["10.5.0.0/24"])
        assert space.pick(ALL, 4) is None
        assert space.usage(4) == (0, 0)

    def test_in_a_slash_64(self) -> None:
        space = Space(["fd00::/64"], [parse_address("fd00::1")], ())
        owned = whole("fd00::/64")
        for want in ("fd00::2", "fd00::3"):
            found = space.pick(owned, 6)
            assert found == parse_address(want)
            space.take(found)
        upper = [(number("fd00::8000:0:0:0"), owned[0][1])]
        assert space.pick(upper, 6) == parse_address("fd00::8000:0:0:0")


class TestOffer:
    def test_upper_half_of_the_largest_run(self, space: Space) -> None:
        assert space.largest_free(ALL, 4) == (BASE + 2, BASE + 254)
        assert space.offer(ALL, 4) == (BASE + 129, BASE + 254)
        space.take(v4(BASE + 200))
        assert space.largest_free(ALL, 4) == (BASE + 2, BASE + 199)
        space.take(v4(BASE + 20))
        assert space.largest_free(ALL, 4) == (BASE + 21, BASE + 199)

    @pytest.mark.parametrize(
        ("size", "given"), [(1, (0, 0)), (2, (1, 1)), (3, (2, 2)), (4, (2, 3)), (5, (3, 4))]
    )
    def test_the_donor_keeps_the_larger_part(
        self, space: Space, size: int, given: tuple[int, int]
    ) -> None:
        low = BASE + 50
        want = (low + given[0], low + given[1])
        assert space.offer([(low, low + size - 1)], 4) == want

    def test_nothing_free(self, space: Space) -> None:
        assert space.offer([], 4) is None
        assert space.offer([(BASE, BASE + 1)], 4) is None  # reserved, both
        space.take(v4(BASE + 9))
        assert space.offer([(BASE + 9, BASE + 9)], 4) is None
        space.release(v4(BASE + 9))
        assert space.offer([(BASE + 9, BASE + 9)], 4) == (BASE + 9, BASE + 9)

    def test_runs_are_found_across_and_inside_blocks(self) -> None:
        space = Space(["10.0.0.0/16"], [], ())
        owned = whole("10.0.0.0/16")
        for n in range(1 << 16):
            if not (1000 <= n < 1010 or 5100 <= n < 5140 or 9000 <= n < 9020):
                space.take(v4(BASE + n))
        assert space.largest_free(owned, 4) == (BASE + 5100, BASE + 5139)
        assert space.offer(owned, 4) == (BASE + 5120, BASE + 5139)
        for n in range(5110, 5130):
            space.take(v4(BASE + n))
        assert space.largest_free(owned, 4) == (BASE + 9000, BASE + 9019)

    def test_half_of_a_slash_64(self) -> None:
        space = Space(["fd00::/64"], [parse_address("fd00::1")], ())
        owned = whole("fd00::/64")
        assert space.largest_free(owned, 6) == (number("fd00::2"), owned[0][1])
        offered = space.offer(owned, 6)
        assert offered == (number("fd00::8000:0:0:1"), owned[0][1])


SIZE = 1 << 10


@given(data=st.data())
def test_against_a_plain_set(data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 1 << 32)))
    low, high = sorted(data.draw(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE))))
    ip_range = data.draw(st.sampled_from(["", "10.0.1.0/24", "10.0.0.128/25", "10.0.2.64/27"]))
    gateway = data.draw(st.integers(1, SIZE - 2))
    space = Space(["10.0.0.0/22"], [v4(BASE + gateway)], [ip_range] if ip_range else ())
    window = whole(ip_range or "10.0.0.0/22")[0]
    reserved = {0, gateway, SIZE - 1}
    dynamic = {n for n in range(SIZE) if window[0] <= BASE + n <= window[1]} - reserved
    density = data.draw(st.sampled_from([0.0, 0.01, 0.5, 0.97, 1.0]))
    users = {n: 1 for n in range(SIZE) if rng.random() < density}
    for n in users:
        space.take(v4(BASE + n))
    marks = sorted({low, high, *(rng.randrange(SIZE) for _ in range(6))})
    owned = [(BASE + a, BASE + b - 1) for a, b in pairwise(marks) if rng.random() < 0.6]
    last = -1
    for _ in range(20):
        n = rng.randrange(SIZE)
        if rng.random() < 0.5:
            space.take(v4(BASE + n))
            users[n] = users.get(n, 0) + 1
        else:
            space.release(v4(BASE + n))
            users[n] = max(users.get(n, 0) - 1, 0)
        used = {n for n, count in users.items() if count}
        assert space.used(v4(BASE + n)) == (n in used)
        assert space.usage(4) == (len(dynamic), len(dynamic & used))
        a, b = sorted((rng.randrange(SIZE), rng.randrange(SIZE)))
        between = [n - BASE for n in space.used_between(BASE + a, BASE + b, 4)]
        assert between == [n for n in range(a, b + 1) if n in used]

        mine = {n - BASE for start, end in owned for n in range(start, end + 1)}
        free = (mine & dynamic) - used
        picked = space.pick(owned, 4)
        if not free:
            assert picked is None
        else:
            after = {n for n in free if n > last} or free
            assert picked == v4(BASE + min(after))
            last = min(after)

        # Runs end where an owned span does: a donation is of one span.
        runs = []
        for start, end in owned:
            run: list[int] = []
            for n in [*range(start - BASE, end - BASE + 1), SIZE]:
                if n in free:
                    run.append(n)
                else:
                    runs.append(run)
                    run = []
        best = max(runs, key=len, default=[])
        if best:
            assert space.largest_free(owned, 4) == (BASE + best[0], BASE + best[-1])
        else:
            assert space.largest_free(owned, 4) is None


class TestCost:
    """Times are of this process alone, far above what is usual, and good if once they are so."""

    OWNED = whole("10.0.0.0/12")

    @staticmethod
    def takes_less(most: float, do: Callable[[T], object], make: Callable[[], T]) -> None:
        """Seconds. Whatever slows this process down passes, sooner than these many tries; each
        has what `make` makes, in no time."""
        took = []
        for _ in range(20):
            made = make()
            began = time.process_time()
            do(made)
            took.append(time.process_time() - began)
            if took[-1] < most:
                return
        raise AssertionError(took)

    @staticmethod
    def random_addresses(count: int) -> list[bytes]:
        rng = random.Random(1)
        return [v4(BASE + n) for n in rng.sample(range(1 << 20), count)]

    def test_marking_a_hundred_thousand(self) -> None:
        for addresses in (
            self.random_addresses(100_000),
            [v4(BASE + n) for n in range(100_000)],
            [(number("fd00::") + n).to_bytes(16) for n in range(100_000)],
        ):

            def take(space: Space, addresses: list[bytes] = addresses) -> None:
                for a in addresses:
                    space.take(a)

            self.takes_less(0.1, take, lambda: Space(["10.0.0.0/12", "fd00::/64"], [], ()))

    def test_a_run_among_a_hundred_thousand(self) -> None:
        for addresses in (
            self.random_addresses(100_000),
            [v4(BASE + n) for n in range(100_000)],
            [v4(BASE + 2 * n) for n in range(100_000)],
        ):
            space = Space(["10.0.0.0/12"], [], ())
            for a in addresses:
                space.take(a)

            space.take(v4(BASE + (1 << 20) - 2))
            self.takes_less(0.05, lambda space: space.offer(self.OWNED, 4), lambda: space)  # noqa: B023
            assert space.offer(self.OWNED, 4)

    def test_a_run_among_scattered_ipv6(self) -> None:
        rng = random.Random(2)
        space = Space(["fd00::/64"], [], ())
        low = number("fd00::")

        def one_more(count: int = 1) -> Space:
            for _ in range(count):
                space.take((low + rng.getrandbits(64)).to_bytes(16))
            return space

        one_more(20_000)
        self.takes_less(0.2, lambda space: space.offer(whole("fd00::/64"), 6), one_more)
        assert space.offer(whole("fd00::/64"), 6)

    def test_picking_past_a_long_used_run(self) -> None:
        def used() -> Space:
            space = Space(["10.0.0.0/12"], [], ())
            for n in range(1 << 19):
                space.take(v4(BASE + n))
            return space

        def pick(space: Space) -> None:
            for _ in range(10_000):
                found = space.pick(self.OWNED, 4)
                assert found is not None
                space.take(found)

        self.takes_less(0.5, pick, used)
