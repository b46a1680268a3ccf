"""Answers that are ready: what goes back for the bytes of a question, by who asks.

A question without its id is the key; the answer without its id is the value, so that one entry
serves all who ask the same in the same way, and the caller puts the id before it. All sandboxes
that are in the same networks share one set of entries. Answers of several records are kept once
for each turn, and given in turn: the round robin goes on.
Whatever changes, `forget` takes out what was made of it, by the names and addresses that
core.names.Names says are stale; nothing else becomes slower.
What stands opposite: server.py fills it, datagrams.py answers from it.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from agent.core.names import View, subject_of
from agent.core.question import Question, reverse_prefix

ANSWERS_MAX = 1 << 17  # some 500 bytes each: 64 MiB. Then all are forgotten: a new one takes 20 µs
TURNS_MAX = 32  # records of an answer that is kept: each question has as many entries


class Ready(NamedTuple):
    """An answer without its id. `address` is where `body` lies, for iovec(3)."""

    address: int
    size: int
    kind: int  # an index of the caller's, to count by
    body: bytes
    turns: Iterator[tuple[int, int]] | None  # address and size of each turn, for ever


Answers = dict[bytes, Ready]


class _Shared(NamedTuple):
    """Of one view: what is ready, and what has not had all its turns yet."""

    ready: Answers
    growing: dict[bytes, list[bytes]]


def _address(body: bytes) -> int:
    found = ctypes.cast(ctypes.c_char_p(body), ctypes.c_void_p).value
    assert found is not None
    return found


class Table:
    """Ready answers by asker."""

    def __init__(self) -> None:
        self.by_source: dict[bytes, Answers] = {}  # 4 or 16 bytes: who may ask
        self._views: dict[View, _Shared] = {}
        self._made_of: dict[str | bytes, list[tuple[_Shared, bytes]]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def turn(self, view: View, key: bytes) -> int | None:
        """Which turn of this answer is to be made next; None if it was not asked for before."""
        shared = self._views.get(view)
        growing = shared.growing.get(key) if shared is not None else None
        return len(growing) if growing is not None else None

    def put(
        self,
        source: bytes,
        view: View,
        question: Question,
        key: bytes,
        body: bytes,
        kind: int,
        turns: int,
    ) -> None:
        """Keep the answer `body` to `key`, the bytes of `question` without id, for `view`.

        `turns`: how many the answer has; it is ready when each was put.
        """
        if self._count >= ANSWERS_MAX:
            self.clear()
        shared = self._views.get(view)
        if shared is None:
            shared = self._views[view] = _Shared({}, {})
        self.by_source[source] = shared.ready
        if key in shared.ready:
            return
        self._count += 1
        growing = shared.growing.get(key)
        if growing is None:
            self._made_of.setdefault(_made_of(question), []).append((shared, key))
        if turns == 1:
            shared.ready[key] = Ready(_address(body), len(body), kind, body, None)
            return
        if growing is None:
            growing = shared.growing[key] = []
        growing.append(body)
        if len(growing) == turns:
            whole = b"".join(growing)  # one object to keep, and each turn a part of it
            start = _address(whole)
            ends = list(itertools.accumulate(map(len, growing)))
            parts = [(start + end - len(b), len(b)) for end, b in zip(ends, growing, strict=True)]
            del shared.growing[key]
            shared.ready[key] = Ready(start, len(whole), kind, whole, itertools.cycle(parts))

    def forget(self, stale: Iterable[str | bytes]) -> None:
        """Take out all that was made of these names and addresses."""
        for each in stale:
            for shared, key in self._made_of.pop(each, ()):
                shared.ready.pop(key, None)
                shared.growing.pop(key, None)

    def forget_sources(self) -> None:
        """Who asks from where is to be looked up anew."""
        self.by_source.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.by_source.clear()
        self._views.clear()
        self._made_of.clear()
        self._count = 0


def _made_of(question: Question) -> str | bytes:
    """The name or address whose change changes the answer.

    Names of networks are not among them: when those change, all is forgotten.
    """
    labels = question.labels
    if not labels:
        return ""
    prefix = reverse_prefix(labels)
    if prefix is not None:
        return prefix.address or b""
    return labels[subject_of(labels)]
