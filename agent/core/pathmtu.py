"""How large a packet gets through to one other node: measured, not read off a device.

Datagrams of a size are sent that no router may cut up; what is answered fits. Source: RFC 8899
(Datagram PLPMTUD), which takes no router's word for it: packets that vanish without a word are the
case that counts, and a forged ICMP message moves nothing here.

A size counts as too large only if it is lost again and again while a small packet, sent right
after it, comes through each time; how often that has to be follows from how many small ones are
lost. So a busy peer, a lossy way and a host that is away lower nothing.
What stands opposite: paths.py, which has all paths of a node; cluster/pathprober.py, the socket.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from enum import Enum
from typing import NamedTuple

ODDS = 1e-6  # that all packets of a size were lost by chance: below it the size does not fit
LOST_MIN, LOST_MAX = 4, 30  # in a row, for a size not to fit
VOID_MAX = 6  # in a row, where the small one was lost too: nothing can be said now
# s between two tries of a size that fitted before: longer than a burst of traffic that drops large
# packets and lets small ones through.
APART = 0.3
WAIT = (0.2, 1.5)  # s for an answer: four round trips, within these bounds
GRACE = (0.05, 0.5)  # s for that of the large packet once the small one's is there: two
FIRST_RTT = 0.1  # s, before anything was measured
FIRST_LOSS = 0.1
GAIN = 0.2  # of a sample, in the averages of loss and round trips


class State(Enum):
    """What is known of a path."""

    UNKNOWN = "unknown"  # not measured yet, or nothing is answered
    WHOLE = "whole"  # what both ends' devices take gets through
    NARROW = "narrow"  # less than that
    SILENT = "silent"  # nothing is answered any more; what was known stands


class Measure(NamedTuple):
    """What a path was found to be. Sizes are of IP packets, bytes; `mtu` 0: not known."""

    state: State
    mtu: int
    expected: int


class _Fits(Enum):
    YES = "yes"
    NO = "no"
    SILENT = "silent"


class _Try(NamedTuple):
    """Send a packet of `size`, after `pause` s; with a small one behind it if `doubly`."""

    size: int
    doubly: bool
    pause: float


class _Came(Enum):
    THROUGH = "through"
    LOST = "lost"  # and the small one behind it came through
    VOID = "void"  # nothing came


_Steps = Generator[_Try, _Came, None]


class Path:
    """One path. Times in s on the caller's clock.

    `top` is what should fit, `floor` what fits through every path of the family; `known` what was
    found in an earlier life, 0 if nothing.
    """

    def __init__(self, top: int, floor: int, known: int = 0) -> None:
        self.floor = min(floor, top)
        self.top = top
        self.mtu = min(known, top)
        self.rtt = FIRST_RTT
        self._is_measured = 0 < self.mtu < top  # with this `top`
        self._is_silent = False
        self._is_timed = False  # `rtt` was measured
        self._loss = FIRST_LOSS
        self._steps: _Steps | None = None
        self._try: _Try | None = None
        self._sent: dict[int, tuple[int, float]] = {}  # nonce -> size, when; of the present look
        self._small: set[int] = set()  # nonces of the small ones of the present try
        self._small_came = False
        self._due = math.inf  # when the present try is to begin, or is over
        self._is_sent = False

    @property
    def measure(self) -> Measure:
        """What is known now."""
        if self._is_silent:
            state = State.SILENT if self.mtu else State.UNKNOWN
        elif not self._is_measured:
            state = State.UNKNOWN
        else:
            state = State.WHOLE if self.mtu >= self.top else State.NARROW
        return Measure(state, self.mtu, self.top)

    @property
    def is_narrow(self) -> bool:
        """Whether less than should was found to fit; also while nothing is answered any more."""
        return self._is_measured and self.mtu < self.top

    @property
    def is_looking(self) -> bool:
        """Whether a look is under way."""
        return self._steps is not None

    @property
    def next_timer(self) -> float:
        """When `handle_timer` is due."""
        return self._due

    def resize(self, top: int, floor: int) -> bool:
        """What should fit is another size now; True if that is so, and a look is due."""
        if top == self.top:
            return False
        was_whole = self._is_measured and self.mtu >= self.top
        self.top, self.floor = top, min(floor, top)
        self.mtu = min(self.mtu, top)
        # Larger than was ever tried is not known to be too large.
        self._is_measured = self._is_measured and not (was_whole and self.mtu < top)
        self._end()
        return True

    def begin(self, now: float) -> None:
        """Look how large a packet fits; nothing if a look is under way."""
        if self._steps is None:
            self._sent.clear()
            self._steps = self._look()
            self._advance(None, now)

    def due(self, now: float) -> list[int]:
        """The sizes of the packets that are to be sent now; `sent` is to be called for each."""
        if self._try is None or self._is_sent or now < self._due:
            return []
        self._is_sent = True
        self._due = now + _clamp(4 * self.rtt, WAIT)
        return [self._try.size, self.floor] if self._try.doubly else [self._try.size]

    def sent(self, nonce: int, size: int, now: float) -> None:
        """A packet of `size` is on its way."""
        self._sent[nonce] = size, now
        if self._try and size == self.floor != self._try.size:
            self._small.add(nonce)

    def unsendable(self, now: float) -> None:
        """The kernel takes no packet of the size in hand: its own device is narrower."""
        if self._try is not None and self._is_sent:
            self._small_came = True
            self._due = now

    def answered(self, nonce: int, now: float) -> bool:
        """A packet came through; False if none such is known."""
        found = self._sent.pop(nonce, None)
        if found is None:
            return False
        size, when = found
        trip = now - when
        self.rtt = self.rtt + GAIN * (trip - self.rtt) if self._is_timed else trip
        self._is_timed = True
        if self._try is None or not self._is_sent:
            return True
        # A late one of an earlier try tells as much: what is larger came through too.
        if size >= self._try.size:
            self._advance(_Came.THROUGH, now)
        elif nonce in self._small:
            self._small_came = True
            self._note_loss(0.0)
            self._due = min(self._due, now + _clamp(2 * self.rtt, GRACE))
        return True

    def handle_timer(self, now: float) -> None:
        """The time for an answer is over."""
        if self._try is None or not self._is_sent or now < self._due:
            return
        if self._small and not self._small_came:
            self._note_loss(1.0)
        self._advance(_Came.LOST if self._small_came else _Came.VOID, now)

    def _note_loss(self, sample: float) -> None:
        self._loss += GAIN * (sample - self._loss)

    def _advance(self, came: _Came | None, now: float) -> None:
        """Go on with the look after what became of a try."""
        assert self._steps is not None
        try:
            step = next(self._steps) if came is None else self._steps.send(came)
        except StopIteration:
            self._end()
            return
        self._try, self._is_sent, self._due = step, False, now + step.pause
        self._small, self._small_came = set(), False

    def _end(self) -> None:
        self._steps = self._try = None
        self._is_sent = False
        self._due = math.inf
        self._sent.clear()

    # -- a look, step by step --

    def _look(self) -> _Steps:
        aim = self.mtu or self.top
        fits = yield from self._fits(aim, APART)
        found = aim
        if fits is _Fits.NO:
            found = yield from self._search(self.floor, aim)
            # Not in a hurry: what is lowered is the MTU of networks.
            if found and (yield from self._fits(aim, APART)) is not _Fits.NO:
                found = 0
        elif fits is _Fits.YES and aim < self.top:
            found = yield from self._widen(aim)
        self._is_silent = fits is _Fits.SILENT
        if found and not self._is_silent:
            self.mtu, self._is_measured = found, True

    def _widen(self, known: int) -> Generator[_Try, _Came, int]:
        """What fits where `known` does; a loss by chance is made good by the next look."""
        if (yield _Try(self.top, True, 0.0)) is _Came.THROUGH:
            return self.top
        if known + 1 == self.top or (yield _Try(known + 1, True, 0.0)) is not _Came.THROUGH:
            return known
        # It has become wider, maybe since the first try.
        fits = yield from self._fits(self.top, 0.0)
        if fits is not _Fits.NO:
            return self.top if fits is _Fits.YES else known
        return (yield from self._search(known + 1, self.top)) or known

    def _search(self, fits: int, too_large: int) -> Generator[_Try, _Came, int]:
        """The largest size that fits, by halves; 0 if nothing is answered meanwhile."""
        while too_large - fits > 1:
            middle = (fits + too_large) // 2
            result = yield from self._fits(middle, 0.0)
            if result is _Fits.SILENT:
                return 0
            if result is _Fits.YES:
                fits = middle
            else:
                too_large = middle
        return fits

    def _fits(self, size: int, apart: float) -> Generator[_Try, _Came, _Fits]:
        """Whether a size fits: at once if the first packet is answered. Where there is no time
        between the tries, that first one is in doubt too."""
        lost = void = 0
        came = yield _Try(size, apart == 0.0, 0.0)
        while came is not _Came.THROUGH:
            if came is _Came.LOST:
                lost, void = lost + 1, 0
                if lost >= self._needed():
                    return _Fits.NO
            else:
                void += 1
                if void > VOID_MAX:
                    return _Fits.SILENT
            came = yield _Try(size, True, apart)
        return _Fits.YES

    def _needed(self) -> int:
        """How many have to be lost in a row, by what share of small ones is lost."""
        share = min(max(self._loss, 0.01), 0.9)
        return min(max(math.ceil(math.log(ODDS) / math.log(share)), LOST_MIN), LOST_MAX)


def _clamp(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
