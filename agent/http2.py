"""One gRPC call after another over HTTP/2, without a socket: bytes in, bytes out.

As a command speaks to the agent of its own host: gRPC's own library takes longer to load than all
that a command does, and the h2 library a third of that. HTTP/2 is its affair; here are gRPC's
messages and statuses in it, for a client that makes one call at a time.
What stands opposite: clientunix.py, which has the socket.
Source: gRPC's PROTOCOL-HTTP2.md; RFC 9113.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import NoAvailableStreamIDError, ProtocolError
from h2.settings import SettingCodes, Settings

from agent.clientcalls import MESSAGE_MAX

FRAME_HEAD = 9  # bytes before the payload of a frame: its length in the first three, its kind
SETTINGS, GOAWAY = 4, 7  # kinds of frames, RFC 9113, 6
CALLS_MAX = H2Connection.HIGHEST_ALLOWED_STREAM_ID
WINDOW_DEFAULT = 65535  # RFC 9113, 6.9.2
WINDOW = 8 << 20  # bytes that may be on their way to us
FRAME_MAX = 1 << 20  # bytes in one of them
FIELDS_MAX = 1 << 20  # bytes of the header fields of an answer
MESSAGE_HEAD = 5  # bytes before a message: whether it is compressed, and its length

CODES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
    "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED",
    "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
# What a stream's or a connection's end by an error code of HTTP/2 stands for; else INTERNAL.
_BY_RESET: dict[int, str] = {
    ErrorCodes.REFUSED_STREAM: "UNAVAILABLE",
    ErrorCodes.CANCEL: "CANCELLED",
    ErrorCodes.ENHANCE_YOUR_CALM: "RESOURCE_EXHAUSTED",
    ErrorCodes.INADEQUATE_SECURITY: "PERMISSION_DENIED",
}
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


GIVEN_UP = Status("CANCELLED", "the call was given up")


class Connection:
    """The client's end of one connection, with one call at a time.

    `begin`, `send` and `finish` make a call, `feed` takes what comes in, `take` gives what is to
    go out. Messages come to `messages`, and when the call has ended `status` says how. `waiting`
    are bytes that the other side does not take yet. `is_open` when it has answered at all.
    """

    def __init__(self) -> None:
        # Names and values are bytes, and ours are right as they are.
        self._http = H2Connection(
            H2Configuration(
                header_encoding=None,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        own = {
            SettingCodes.ENABLE_PUSH: 0,
            SettingCodes.INITIAL_WINDOW_SIZE: WINDOW,
            SettingCodes.MAX_FRAME_SIZE: FRAME_MAX,
            SettingCodes.MAX_HEADER_LIST_SIZE: FIELDS_MAX,
        }
        self._http.local_settings = Settings(client=True, initial_values=own)
        self._http.max_inbound_frame_size = FRAME_MAX
        self._http.decoder.max_header_list_size = FIELDS_MAX
        self._http.initiate_connection()
        self._http.increment_flow_control_window(WINDOW - WINDOW_DEFAULT)
        self.is_open = False
        self._in = bytearray()
        self._last = CALLS_MAX  # the last call that is taken: all are
        self._stream = 0
        self._reset()

    def _reset(self) -> None:
        self.messages: deque[bytes] = deque()
        self.status: Status | None = None
        self._partial = bytearray()
        self._told: Status | None = None  # how the call will have ended, when it has
        self._pending = bytearray()  # of requests
        self._is_finished = False  # by us

    @property
    def waiting(self) -> int:
        """Bytes of requests that wait until the other side takes more."""
        return len(self._pending)

    @property
    def is_ending(self) -> bool:
        """Whether the other side has said that it takes no more calls here."""
        return self._last < CALLS_MAX

    def begin(self, path: str, fields: Mapping[bytes, bytes]) -> None:
        """Begin a call of a method; what is under way is cancelled. Broken if no more can be."""
        self.cancel()
        self._reset()
        head = {b":method": b"POST", b":scheme": b"http", b":path": path.encode(), **fields}
        try:
            self._stream = self._http.get_next_available_stream_id()
            if self._stream > self._last:
                raise Broken("the agent takes no more calls on this connection")
            self._http.send_headers(self._stream, list(head.items()))
        except (ProtocolError, NoAvailableStreamIDError) as error:
            raise Broken(f"no more calls on this connection ({error})") from None

    def send(self, message: bytes) -> None:
        """One request of the call."""
        self._pending += b"\0" + len(message).to_bytes(4) + message
        self._fill()

    def finish(self) -> None:
        """That was the last request."""
        self._is_finished = True
        self._fill()

    def cancel(self, why: Status = GIVEN_UP) -> None:
        """Give up what is under way, if it is; it has ended as `why` says."""
        if self._stream and self.status is None:
            with suppress(ProtocolError):  # it has ended meanwhile, or everything has
                self._http.reset_stream(self._stream, ErrorCodes.CANCEL)
            self._end(*why)

    def take(self) -> bytes:
        """What is to go out now."""
        return self._http.data_to_send()

    def feed(self, data: bytes) -> None:
        """What came in; nothing is the end. Broken if there is no going on."""
        if not data:
            raise Broken("the connection has ended")
        self._in += data
        at = 0
        while len(self._in) - at >= FRAME_HEAD:
            length, kind = int.from_bytes(self._in[at : at + 3]), self._in[at + 3]
            if not self.is_open and kind != SETTINGS:
                raise Broken("what answers does not speak HTTP/2")
            if length > FRAME_MAX:
                raise Broken(f"a frame of {length} bytes")
            end = at + FRAME_HEAD + length
            if len(self._in) < end:
                break
            self._take_frame(kind, bytes(self._in[at:end]))
            at = end
        del self._in[:at]

    def _take_frame(self, kind: int, frame: bytes) -> None:
        if kind == GOAWAY:
            # For h2 that is the end of all; but calls up to that one are still answered (6.8).
            self._last = int.from_bytes(frame[FRAME_HEAD : FRAME_HEAD + 4]) & CALLS_MAX
            if self._stream > self._last and self.status is None:
                self._end("UNAVAILABLE", "the agent takes no more calls")
            return
        try:
            for event in self._http.receive_data(frame):
                self._take_event(event)
            self._fill()
        except ProtocolError as error:
            raise Broken(f"what answers is not understood ({error})") from None

    def _take_event(self, event: Event) -> None:
        if isinstance(event, RemoteSettingsChanged):
            self.is_open = True
        elif isinstance(event, DataReceived):
            if event.stream_id == self._stream and self.status is None:
                self._partial += event.data
                self._cut()
            self._http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif getattr(event, "stream_id", None) != self._stream or self.status is not None:
            return  # of a call before
        elif isinstance(event, ResponseReceived | TrailersReceived):
            self._take_fields(dict(event.headers))
        elif isinstance(event, StreamEnded):
            self._end(*(self._told or Status("INTERNAL", "the answer has no status")))
        elif isinstance(event, StreamReset):
            code = int(event.error_code)
            text = f"the call was reset (HTTP/2 error {code})"
            self._end(_BY_RESET.get(code, "INTERNAL"), text)

    def _take_fields(self, fields: Mapping[bytes, bytes]) -> None:
        """The first header fields of an answer, or the last ones, or both at once."""
        code = fields.get(b":status", b"")
        if code not in (b"", b"200"):
            self.cancel(_read_status(fields, code))
        elif b"grpc-status" in fields or not code:
            self._told = _read_status(fields, code)

    def _cut(self) -> None:
        """Take whole messages off what came."""
        at = 0
        while len(self._partial) - at >= MESSAGE_HEAD:
            length = int.from_bytes(self._partial[at + 1 : at + MESSAGE_HEAD])
            if self._partial[at] or length > MESSAGE_MAX:
                why = "compressed" if self._partial[at] else f"too large ({length} bytes)"
                code = "INTERNAL" if self._partial[at] else "RESOURCE_EXHAUSTED"
                self.cancel(Status(code, f"the answer is {why}"))
                return
            end = at + MESSAGE_HEAD + length
            if len(self._partial) < end:
                break
            self.messages.append(bytes(self._partial[at + MESSAGE_HEAD : end]))
            at = end
        del self._partial[:at]

    def _fill(self) -> None:
        """Send of what waits as much as the other side takes, and the end behind it."""
        if self.status is not None or not self._stream:
            return
        at = 0
        while at < len(self._pending):
            room = self._http.local_flow_control_window(self._stream)
            room = min(room, self._http.max_outbound_frame_size)
            if room <= 0:
                break
            piece = bytes(self._pending[at : at + room])
            at += len(piece)
            self._http.send_data(self._stream, piece)
        del self._pending[:at]
        if self._is_finished and not self._pending:
            self._http.end_stream(self._stream)
            self._is_finished = False

    def _end(self, code: str, text: str, details: bytes = b"") -> None:
        self.status = Status(code, text, details)
        self._pending.clear()


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
    if b"%" in data:
        from urllib.parse import unquote_to_bytes  # 5 ms, for what hardly any answer has

        data = unquote_to_bytes(data)
    return data.decode(errors="replace")


def _from_base64(data: bytes) -> bytes:
    from binascii import Error, a2b_base64

    try:
        return a2b_base64(data + b"=" * (-len(data) % 4))
    except Error:
        return b""
