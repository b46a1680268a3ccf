"""One gRPC call after another over HTTP/2, without a socket: bytes in, bytes out.

As a command speaks to the agent of its own host: gRPC's own library takes longer to load than all
that a command does. Written after RFC 9113 and gRPC's PROTOCOL-HTTP2.md; it has what a client
needs that makes one call at a time, and takes what any server may send.
What stands opposite: clientunix.py, which has the socket; hpack.py reads the header fields.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from agent.clientcalls import MESSAGE_MAX
from agent.hpack import Malformed, Reader, write_fields

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # 3.4
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    0, 1, 3, 4, 6, 7, 8, 9,
)  # fmt: skip
_PUSH_PROMISE = 5
END_STREAM = ACK = 0x1
END_HEADERS, PADDED, PRIORITY = 0x4, 0x8, 0x20
INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 4, 5  # settings, 6.5.2
CANCEL = 8  # 7

HEAD = 9  # bytes before the payload of a frame
WINDOW_DEFAULT = 65535
WINDOW_LARGEST = (1 << 31) - 1
WINDOW = 8 << 20  # bytes that may be on their way to us
FRAME_MAX = 1 << 20  # bytes in one of them
FRAME_DEFAULT = 1 << 14  # bytes in one of ours, where the other side does not say more
BLOCK_MAX = 1 << 20  # bytes of one header block, packed
MESSAGE_HEAD = 5  # bytes before a message: whether it is compressed, and its length

CODES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
    "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED",
    "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
# What a stream's or a connection's end by an error code of HTTP/2 stands for; else INTERNAL.
_BY_RESET = {7: "UNAVAILABLE", 8: "CANCELLED", 11: "RESOURCE_EXHAUSTED", 12: "PERMISSION_DENIED"}
# Of an answer that does not come from gRPC; else UNKNOWN.
_BY_HTTP = {
    b"400": "INTERNAL",
    b"401": "UNAUTHENTICATED",
    b"403": "PERMISSION_DENIED",
    b"404": "UNIMPLEMENTED",
    **dict.fromkeys((b"429", b"502", b"503", b"504"), "UNAVAILABLE"),
}


class Broken(ConnectionError):
    """What came is no HTTP/2, or its connection has ended: nothing more can be called there."""


class Status(NamedTuple):
    """How a call ended: gRPC's name for it, a text, and a google.rpc.Status or nothing."""

    code: str
    text: str = ""
    details: bytes = b""


class Connection:
    """The client's end of one connection, with one call at a time.

    `begin`, `send` and `finish` make a call, `feed` takes what comes in, `take` gives what is to
    go out. Messages come to `messages`, and when the call has ended `status` says how. `waiting`
    are bytes that the other side does not take yet. `is_open` when it has answered at all.
    """

    def __init__(self) -> None:
        own = {2: 0, INITIAL_WINDOW_SIZE: WINDOW, MAX_FRAME_SIZE: FRAME_MAX}  # 2: ENABLE_PUSH
        payload = b"".join(k.to_bytes(2) + v.to_bytes(4) for k, v in own.items())
        self._out = bytearray(PREFACE + _frame(SETTINGS, 0, 0, payload))
        self._grant(0, WINDOW - WINDOW_DEFAULT)
        self.is_open = False
        self._reader = Reader()
        self._in = bytearray()
        self._block: tuple[int, int, bytearray] | None = None  # stream, flags: until END_HEADERS
        self._frame_max = FRAME_DEFAULT
        self._window = WINDOW_DEFAULT  # bytes that the other side takes of all calls
        self._call_window_first = self._call_window = WINDOW_DEFAULT  # and of one
        self._taken = self._call_taken = 0  # bytes that came in and were not granted again
        self._last = WINDOW_LARGEST  # the last call that is taken: all are
        self._stream = -1
        self._reset()

    def _reset(self) -> None:
        self.messages: deque[bytes] = deque()
        self.status: Status | None = None
        self._partial = bytearray()
        self._has_headers = False
        self._pending = bytearray()  # of requests
        self._is_finished = False  # by us
        self._call_taken = 0

    @property
    def waiting(self) -> int:
        """Bytes of requests that wait until the other side takes more."""
        return len(self._pending)

    def begin(self, path: str, fields: Mapping[bytes, bytes]) -> None:
        """Begin a call of a method; what is under way is cancelled. Broken if no more can be."""
        self.cancel()
        self._stream += 2
        if self._stream > self._last:
            raise Broken("the agent takes no more calls on this connection")
        self._reset()
        self._call_window = self._call_window_first
        head = {b":method": b"POST", b":scheme": b"http", b":path": path.encode(), **fields}
        block = write_fields(head.items())
        self._out += _frame(HEADERS, END_HEADERS, self._stream, block)

    def send(self, message: bytes) -> None:
        """One request of the call."""
        self._pending += b"\0" + len(message).to_bytes(4) + message
        self._fill()

    def finish(self) -> None:
        """That was the last request."""
        self._is_finished = True
        self._fill()

    def cancel(self) -> None:
        """Give up what is under way, if it is."""
        if self._stream > 0 and self.status is None:
            self._out += _frame(RST_STREAM, 0, self._stream, CANCEL.to_bytes(4))
            self._end("CANCELLED", "the call was given up")

    def take(self) -> bytes:
        """What is to go out now."""
        out = bytes(self._out)
        self._out.clear()
        return out

    def feed(self, data: bytes) -> None:
        """What came in; nothing is the end. Broken if there is no going on."""
        if not data:
            raise Broken("the connection has ended")
        self._in += data
        at = 0
        while len(self._in) - at >= HEAD:
            length = int.from_bytes(self._in[at : at + 3])
            kind, flags = self._in[at + 3], self._in[at + 4]
            stream = int.from_bytes(self._in[at + 5 : at + 9]) & WINDOW_LARGEST
            if not self.is_open and kind != SETTINGS:
                raise Broken("what answers does not speak HTTP/2")
            if length > FRAME_MAX:
                raise Broken(f"a frame of {length} bytes")
            if len(self._in) - at < HEAD + length:
                break
            payload = bytes(self._in[at + HEAD : at + HEAD + length])
            at += HEAD + length
            try:
                self._take_frame(kind, flags, stream, payload)
            except (Malformed, IndexError) as error:
                raise Broken(f"what answers is not understood ({error})") from None
        del self._in[:at]

    def _take_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if self._block and kind != CONTINUATION:
            raise Malformed("a header block that is cut in two")
        is_ours = stream == self._stream and self.status is None
        if kind == DATA:
            self._take_data(flags, payload, is_ours)
        elif kind == HEADERS:
            block = _unpadded(flags, payload)
            block = block[5:] if flags & PRIORITY else block
            self._block = stream, flags, bytearray(block)
            self._take_block(flags)
        elif kind == CONTINUATION:
            if not self._block or self._block[0] != stream:
                raise Malformed("a header block that goes on without a beginning")
            self._block[2].extend(payload)
            self._take_block(flags)
        elif kind == SETTINGS:
            self._take_settings(flags, payload)
        elif kind == WINDOW_UPDATE:
            self._take_window(stream, payload)
        elif kind == PING and not flags & ACK:
            self._out += _frame(PING, ACK, 0, payload)
        elif kind == RST_STREAM and is_ours:
            code = int.from_bytes(payload)
            self._end(_BY_RESET.get(code, "INTERNAL"), f"the call was reset (HTTP/2 error {code})")
        elif kind == GOAWAY:
            self._last = int.from_bytes(payload[:4]) & WINDOW_LARGEST
            if self._stream > self._last and self.status is None:
                self._end("UNAVAILABLE", "the agent takes no more calls")
        elif kind == _PUSH_PROMISE:
            raise Malformed("a push, though we take none")

    def _take_data(self, flags: int, payload: bytes, is_ours: bool) -> None:
        self._taken += len(payload)
        if self._taken >= WINDOW // 2:
            self._grant(0, self._taken)
            self._taken = 0
        if not is_ours:
            return
        self._call_taken += len(payload)
        self._partial += _unpadded(flags, payload)
        self._cut()
        if self.status is not None:
            return
        if flags & END_STREAM:
            self._end("INTERNAL", "the answer has no status")
        elif self._call_taken >= WINDOW // 2:
            self._grant(self._stream, self._call_taken)
            self._call_taken = 0

    def _cut(self) -> None:
        """Take whole messages off what came."""
        at = 0
        while len(self._partial) - at >= MESSAGE_HEAD:
            length = int.from_bytes(self._partial[at + 1 : at + MESSAGE_HEAD])
            if self._partial[at] or length > MESSAGE_MAX:
                why = "compressed" if self._partial[at] else f"too large ({length} bytes)"
                code = "INTERNAL" if self._partial[at] else "RESOURCE_EXHAUSTED"
                self.cancel()
                self.status = Status(code, f"the answer is {why}")
                return
            end = at + MESSAGE_HEAD + length
            if len(self._partial) < end:
                break
            self.messages.append(bytes(self._partial[at + MESSAGE_HEAD : end]))
            at = end
        del self._partial[:at]

    def _take_block(self, flags: int) -> None:
        assert self._block
        stream, first, block = self._block
        if len(block) > BLOCK_MAX:
            raise Malformed(f"a header block of more than {BLOCK_MAX} bytes")
        if not flags & END_HEADERS:
            return
        self._block = None
        fields = dict(self._reader.read(bytes(block)))  # also what is not ours: it has a table
        if stream != self._stream or self.status is not None:
            return
        code = fields.get(b":status", b"")
        if not self._has_headers and code.startswith(b"1"):
            return  # more headers come
        if first & END_STREAM:
            self.status = _read_status(fields, code)
            self._pending.clear()
        elif not self._has_headers and code != b"200":
            self.cancel()
            self.status = _read_status(fields, code)
        self._has_headers = True

    def _take_settings(self, flags: int, payload: bytes) -> None:
        if flags & ACK:
            return
        self.is_open = True
        for at in range(0, len(payload) - 5, 6):
            key, value = int.from_bytes(payload[at : at + 2]), payload[at + 2 : at + 6]
            number = int.from_bytes(value)
            if key == INITIAL_WINDOW_SIZE:
                self._call_window += number - self._call_window_first
                self._call_window_first = number
            elif key == MAX_FRAME_SIZE:
                self._frame_max = min(number, FRAME_MAX)
        self._out += _frame(SETTINGS, ACK, 0, b"")
        self._fill()

    def _take_window(self, stream: int, payload: bytes) -> None:
        more = int.from_bytes(payload) & WINDOW_LARGEST
        if not stream:
            self._window += more
        elif stream == self._stream:
            self._call_window += more
        self._fill()

    def _fill(self) -> None:
        """Send of what waits as much as the other side takes, and the end behind it."""
        if self.status is not None or self._stream < 1:
            return
        at = 0
        while at < len(self._pending):
            room = min(self._window, self._call_window, self._frame_max)
            if room <= 0:
                break
            piece = self._pending[at : at + room]
            at += len(piece)
            self._window -= len(piece)
            self._call_window -= len(piece)
            is_last = self._is_finished and at == len(self._pending)
            self._out += _frame(DATA, END_STREAM if is_last else 0, self._stream, piece)
            if is_last:
                self._is_finished = False
        del self._pending[:at]
        if self._is_finished and not self._pending:
            self._out += _frame(DATA, END_STREAM, self._stream, b"")
            self._is_finished = False

    def _grant(self, stream: int, more: int) -> None:
        self._out += _frame(WINDOW_UPDATE, 0, stream, more.to_bytes(4))

    def _end(self, code: str, text: str) -> None:
        self.status = Status(code, text)
        self._pending.clear()


def _frame(kind: int, flags: int, stream: int, payload: bytes | bytearray) -> bytes:
    head = len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4)
    return head + payload


def _unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & PADDED:
        return payload
    end = len(payload) - payload[0]
    if end < 1:
        raise Malformed("padding without an end")
    return payload[1:end]


def _read_status(fields: Mapping[bytes, bytes], http: bytes) -> Status:
    """What the last header block of an answer says."""
    code = fields.get(b"grpc-status", b"")
    if not code.isdigit():
        if http in (b"", b"200"):
            return Status("UNKNOWN", "the answer has no status")
        text = f"the answer is HTTP's {http.decode(errors='replace')}"
        return Status(_BY_HTTP.get(http, "UNKNOWN"), text)
    number = int(code)
    name = CODES[number] if number < len(CODES) else "UNKNOWN"
    text = _unquote(fields.get(b"grpc-message", b""))
    return Status(name, text, _from_base64(fields.get(b"grpc-status-details-bin", b"")))


def _unquote(data: bytes) -> str:
    """A text with its percent encoding undone; what is none stays as it is."""
    first, *parts = data.split(b"%")
    found = bytearray(first)
    for part in parts:
        try:
            found.append(int(part[:2].decode("ascii"), 16) if len(part) >= 2 else -1)
            found += part[2:]
        except ValueError:
            found += b"%" + part
    return found.decode(errors="replace")


def _from_base64(data: bytes) -> bytes:
    from binascii import Error, a2b_base64

    try:
        return a2b_base64(data + b"=" * (-len(data) % 4))
    except Error:
        return b""
