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
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from agent.core.names import View, subject_of
from agent.core.question import Question, reverse_prefix

ANSWERS_MAX = 1 << 17  # some 600 bytes each: 80 MiB. Then all are forgotten: a new one takes 20 µs
POSITIVE = 0  # the kind of what is most asked for
IOVEC = struct.Struct("@PN")  # struct iovec: address, bytes
TURNS_MAX = 32  # records of an answer that is kept: each question has as many entries


class Ready(NamedTuple):
    """An answer that is given in turns, or is no positive one."""

    kind: int  # an index of the caller's, to count by
    turns: Iterator[bytes]  # iovec of each turn, for ever


# By question: the iovec(3) of a positive answer of one record, as nearly all are, or the others.
Answers = dict[bytes, bytes | Ready]


class _Shared(NamedTuple):
    """Of one view: what is ready, the bytes that it points to, and what lacks turns yet."""

    ready: Answers
    bodies: dict[bytes, bytes]
    growing: dict[bytes, list[bytes]]


# Where the bytes of a bytes object begin: PyBytesObject in CPython's bytesobject.h. To ask ctypes
# each time would take a tenth of making the answer.
_BODY = bytes.__basicsize__ - 1
_SAMPLE = b"sample"
if ctypes.cast(ctypes.c_char_p(_SAMPLE), ctypes.c_void_p).value != id(_SAMPLE) + _BODY:
    raise ImportError("this Python keeps bytes otherwise than CPython does")


def _iovec(body: bytes, start: int, size: int) -> bytes:
    """Part of `body`, which has to be kept as long as this is."""
    return IOVEC.pack(id(body) + _BODY + start, size)


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
            shared = self._views[view] = _Shared({}, {}, {})
        self.by_source[source] = shared.ready
        if key in shared.ready:
            return
        self._count += 1
        growing = shared.growing.get(key)
        if growing is None:
            self._made_of.setdefault(_made_of(question), []).append((shared, key))
        if turns == 1 and kind == POSITIVE:
            shared.bodies[key] = body
            shared.ready[key] = _iovec(body, 0, len(body))
            return
        if growing is None:
            growing = shared.growing[key] = []
        growing.append(body)
        if len(growing) < turns:
            return
        del shared.growing[key]
        shared.bodies[key] = whole = b"".join(growing)
        ends = itertools.accumulate(map(len, growing))
        parts = [_iovec(whole, end - len(b), len(b)) for end, b in zip(ends, growing, strict=True)]
        shared.ready[key] = Ready(kind, itertools.cycle(parts))

    def forget(self, stale: Iterable[str | bytes]) -> None:
        """Take out all that was made of these names and addresses."""
        for each in stale:
            for shared, key in self._made_of.pop(each, ()):
                shared.ready.pop(key, None)
                shared.bodies.pop(key, None)
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
