"""What is to be done follows from what is there, whatever was told before."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.api.docker.bindings import Bound
from agent.api.docker.bodies import ID
from agent.api.docker.comparing import NAME, Steps, body_of, compare, labels_of
from agent.model import Network
from agent.notation import LABELS_MAX

ONE, TWO = "1" * 16, "2" * 16
D1, D2 = "a" * 64, "b" * 64


def ours(id: str, **labels: str) -> Network:
    return Network(
        id, f"n{id[0]}", "overlay", ("10.1.0.0/24", "fd00:1::/64"), ("10.1.0.1", "fd00:1::1"), "",
        5000, 0, False, False, {}, labels, 1.0, "n" * 16,
    )  # fmt: skip


def theirs(id: str, name: str, **options: str) -> dict[str, Any]:
    return {"Id": id, "Name": name, "Driver": "vxmesh", "Options": options, "Labels": {"a": "b"}}


def run(
    listed: list[dict[str, Any]],
    bound: dict[str, Bound],
    networks: list[Network],
    *,
    settled: set[str] | None = None,
    destroyed: tuple[str, ...] = (),
    complete: bool = True,
) -> Steps:
    return compare(
        listed,
        bound,
        {n.id: n for n in networks},
        me="n" * 16,
        settled=set(bound) if settled is None else settled,
        destroyed=destroyed,
        complete=complete,
    )


def test_nothing_is_to_be_done_where_all_is_right() -> None:
    named = ours(ONE, **{NAME: "web"})
    right = run([theirs(D1, "web")], {D1: Bound(ONE, True)}, [named])
    assert right == Steps()


def test_a_network_that_a_user_made_gets_its_name() -> None:
    steps = run([theirs(D1, "web")], {D1: Bound(ONE, True)}, [ours(ONE)])
    assert list(steps.tell) == [ONE] and not steps.create
    # One that was only tied to ours is no reason to have it everywhere.
    assert run([theirs(D1, "web")], {D1: Bound(ONE, False)}, [ours(ONE)]) == Steps()


def test_what_is_missing_is_made_by_its_name_or_one_like_it() -> None:
    named = ours(ONE, **{NAME: "web"})
    assert run([], {}, [named]).create == [(named, "web")]
    bridge = {"Id": D2, "Name": "web", "Driver": "bridge"}
    assert run([bridge], {}, [named]).create == [(named, "web-111111")]
    both = [named, ours(TWO, **{NAME: "web"})]
    assert [name for _, name in run([], {}, both).create] == ["web", "web-222222"]
    assert run([], {}, [ours(ONE)]) == Steps()  # nobody asked for it by an engine


def test_what_is_being_made_is_not_made_twice() -> None:
    named = ours(ONE, **{NAME: "web"})
    assert run([], {D1: Bound(ONE, True)}, [named], settled=set()) == Steps()


def test_what_is_gone_is_removed_once_all_is_known() -> None:
    listed, bound = [theirs(D1, "web", **{"vxmesh.network": ONE})], {D1: Bound(ONE, True)}
    assert run(listed, bound, []).remove == [D1]
    assert run(listed, {}, []).remove == [D1]
    assert run(listed, bound, [], complete=False) == Steps()
    again = ours(TWO, **{NAME: "web"})
    steps = run(listed, bound, [again])
    assert (steps.remove, steps.create) == ([D1], [(again, "web")])


def test_what_the_engine_lost_is_made_again_and_what_was_removed_goes() -> None:
    named, bound = ours(ONE, **{NAME: "web"}), {D1: Bound(ONE, True)}
    lost = run([], bound, [named])
    assert (lost.forget, lost.gone, lost.create) == ([D1], [], [(named, "web")])
    removed = run([], bound, [named], destroyed=(D1,))
    assert (removed.forget, removed.gone, removed.create) == ([D1], [ONE], [])
    tied = run([], {D1: Bound(ONE, False)}, [named], destroyed=(D1,))
    assert (tied.gone, tied.create) == ([], [(named, "web")])


def test_bindings_that_were_lost_are_found_again() -> None:
    listed = [theirs(D1, "web", **{"vxmesh.network": ONE, "vxmesh.follows": "true"})]
    steps = run(listed, {}, [ours(ONE, **{NAME: "web"})])
    assert steps.bind == {D1: Bound(ONE, True)} and not steps.create


def test_others_networks_are_left_alone() -> None:
    others = [{"Id": D1, "Name": "x", "Driver": "bridge", "Options": {"vxmesh.network": "gone"}}]
    assert run(others, {}, []) == Steps()


def test_the_request_and_the_labels() -> None:
    body = body_of(ours(ONE, **{NAME: "web", ID: D1, "a": "b"}), "web")
    assert body["Labels"] == {"a": "b"} and body["EnableIPv6"]
    assert body["IPAM"]["Config"] == [
        {"Subnet": "10.1.0.0/24", "Gateway": "10.1.0.1"},
        {"Subnet": "fd00:1::/64", "Gateway": "fd00:1::1"},
    ]
    labels = {"good": "x", "bad key": "x", "long": "x" * 300, NAME: "other", ID: D2}
    told = {"Id": D1, "Name": "Web_1", "Labels": labels}
    assert labels_of(told) == {NAME: "Web_1", ID: D1, "good": "x"}
    many = {f"k{n}": "" for n in range(2 * LABELS_MAX)}
    assert len(labels_of({"Id": D1, "Name": "w", "Labels": many})) == LABELS_MAX


def test_what_was_made_for_a_network_that_never_came_to_be_goes() -> None:
    made = ours(ONE, **{ID: D1})
    assert run([], {}, [made]).stale == {D1: ONE}
    # Bound: the engine is about to list it. Named: it is all hosts'. Another node's is its own.
    assert not run([], {D1: Bound(ONE, True)}, [made], settled=set()).stale
    assert not run([], {}, [ours(ONE, **{ID: D1, NAME: "web"})]).stale
    assert not run([], {}, [msgspec.structs.replace(made, creator="x" * 16)]).stale


def test_a_binding_that_was_lost_is_found_by_the_label() -> None:
    steps = run([theirs(D1, "web")], {}, [ours(ONE, **{ID: D1})])
    assert steps.bind == {D1: Bound(ONE, True)}
    assert not steps.stale and not steps.create and not steps.remove


def test_a_network_that_was_tied_by_name_is_found_again() -> None:
    for ref in (ONE, "n1", "111"):
        steps = run([theirs(D1, "web", **{"vxmesh.network": ref})], {}, [ours(ONE), ours(TWO)])
        assert steps == Steps(bind={D1: Bound(ONE, False)})
    for ref in ("n3", ""):
        assert not run([theirs(D1, "web", **{"vxmesh.network": ref})], {}, [ours(ONE)]).bind
