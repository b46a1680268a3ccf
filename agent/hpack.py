"""Header fields as HTTP/2 writes them (HPACK, RFC 7541): all of reading, of writing the plainest.

What is written is never indexed and never Huffman coded, which every reader has to take. What is
read of one connection takes one `Reader`: fields refer to those that came before.
What stands opposite: http2.py, which has the frames around.
"""

from __future__ import annotations

from collections.abc import Iterable

Field = tuple[bytes, bytes]

TABLE_MAX = 4096  # bytes; SETTINGS_HEADER_TABLE_SIZE where nobody says more (RFC 9113, 6.5.2)
FIELD_OVERHEAD = 32  # bytes that a field in the table takes beside its own (4.1)
BLOCK_MAX = 1 << 20  # bytes of the fields of one block, unpacked: a few octets can stand for much

# Appendix A, the fields that both sides know, from 1 on.
_KNOWN = """\
:authority|:method GET|:method POST|:path /|:path /index.html|:scheme http|:scheme https\
|:status 200|:status 204|:status 206|:status 304|:status 400|:status 404|:status 500\
|accept-charset|accept-encoding gzip, deflate|accept-language|accept-ranges|accept\
|access-control-allow-origin|age|allow|authorization|cache-control|content-disposition\
|content-encoding|content-language|content-length|content-location|content-range|content-type\
|cookie|date|etag|expect|expires|from|host|if-match|if-modified-since|if-none-match|if-range\
|if-unmodified-since|last-modified|link|location|max-forwards|proxy-authenticate\
|proxy-authorization|range|referer|refresh|retry-after|server|set-cookie\
|strict-transport-security|transfer-encoding|user-agent|vary|via|www-authenticate"""

# Appendix B. Its code is canonical, so how many bits each octet takes says all of it: 5 for an
# "a" here, 30 for a "z". The last one, after the octets, is the end of a string.
_BITS = """\
isxxxxxxxtzxxzxxxxxxxxzxxxxxxxxxbffhibdgffdgdbbbaaabbbbbbbcdkbhfibcccccccccccccc\
ccccccccdcdioijbkabababbbaccbbbabcbaabccccckgjixprpprrrsrssssststtrstssssqrsrsst\
rqprrssqsrrtqrssqqrqsrssprrrsrrsvvporsruvvvwwvtuoqvwwvwtqqvvxwwwptpqrqqsrruuttvs\
vwvvwwwwwxwwwwwvz"""


class Malformed(ValueError):
    """What came is no HPACK."""


def write_fields(fields: Iterable[Field]) -> bytes:
    """A block of fields, each one as a literal that no table is to have (6.2.2)."""
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in fields)


class Reader:
    """Reads the blocks of one connection, in their order."""

    def __init__(self) -> None:
        self._table: list[Field] = []  # the newest first
        self._size = 0
        self._most = TABLE_MAX

    def read(self, block: bytes) -> list[Field]:
        """The fields of a block; Malformed if it is none."""
        fields: list[Field] = []
        at, unpacked = 0, 0
        try:
            while at < len(block):
                first = block[at]
                if first & 0x80:  # 6.1
                    index, at = _read_number(block, at, 7)
                    field = self._find(index)
                elif first & 0xE0 == 0x20:  # 6.3
                    most, at = _read_number(block, at, 5)
                    if most > TABLE_MAX:
                        raise Malformed(f"a table of {most} bytes")
                    self._most = most
                    self._evict()
                    continue
                else:  # 6.2
                    is_kept = bool(first & 0x40)
                    index, at = _read_number(block, at, 6 if is_kept else 4)
                    if index:
                        name = self._find(index)[0]
                    else:
                        name, at = _read_text(block, at)
                    value, at = _read_text(block, at)
                    field = name, value
                    if is_kept:
                        self._table.insert(0, field)
                        self._size += _size(field)
                        self._evict()
                unpacked += _size(field)
                if unpacked > BLOCK_MAX:
                    raise Malformed(f"fields of more than {BLOCK_MAX} bytes")
                fields.append(field)
        except IndexError:
            raise Malformed("a block that ends too soon") from None
        return fields

    def _find(self, index: int) -> Field:
        known = _known()
        if 0 < index <= len(known):
            return known[index - 1]
        if 0 < index <= len(known) + len(self._table):
            return self._table[index - 1 - len(known)]
        raise Malformed(f"no field has index {index}")

    def _evict(self) -> None:
        while self._size > self._most:
            self._size -= _size(self._table.pop())


def _size(field: Field) -> int:
    return len(field[0]) + len(field[1]) + FIELD_OVERHEAD


def _text(value: bytes) -> bytes:
    """A string that is not Huffman coded (5.2), behind its length as a number (5.1)."""
    length, more = len(value), bytearray()
    if length < 0x7F:
        return bytes([length]) + value
    length -= 0x7F
    while length >= 0x80:
        more.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([0x7F, *more, length]) + value


def _read_number(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """A number that begins in the last `bits` of an octet (5.1), and where it ends."""
    most = (1 << bits) - 1
    number = block[at] & most
    at += 1
    if number < most:
        return number, at
    for shift in range(0, 35, 7):
        octet = block[at]
        at += 1
        number += (octet & 0x7F) << shift
        if not octet & 0x80:
            return number, at
    raise Malformed("a number that is too large")


def _read_text(block: bytes, at: int) -> tuple[bytes, int]:
    is_coded = block[at] & 0x80
    length, at = _read_number(block, at, 7)
    end = at + length
    if end > len(block):
        raise Malformed("a string that ends too soon")
    value = block[at:end]
    return (_decode(value) if is_coded else value), end


def _decode(data: bytes) -> bytes:
    """What a Huffman coded string stands for (5.2)."""
    octets = _codes()
    found = bytearray()
    code = bits = 0
    for octet in data:
        for shift in range(7, -1, -1):
            code = code << 1 | octet >> shift & 1
            bits += 1
            if (which := octets.get((bits, code))) is not None:
                if which > 0xFF:
                    raise Malformed("a string with an end in it")
                found.append(which)
                code = bits = 0
            elif bits > 30:
                raise Malformed("a string with no such code")
    if bits > 7 or code != (1 << bits) - 1:
        raise Malformed("a string that is not filled up as it should")
    return bytes(found)


# Both made at the first use: a command that all goes well for needs but one of them.
_made_known: list[Field] = []
_made_codes: dict[tuple[int, int], int] = {}


def _known() -> list[Field]:
    if not _made_known:
        for text in _KNOWN.split("|"):
            name, _, value = text.partition(" ")
            _made_known.append((name.encode(), value.encode()))
    return _made_known


def _codes() -> dict[tuple[int, int], int]:
    """(bits, code) -> octet; as in RFC 1951, 3.2.2."""
    if not _made_codes:
        code = before = 0
        for bits, octet in sorted((ord(c) - ord("a") + 5, i) for i, c in enumerate(_BITS)):
            code <<= bits - before
            _made_codes[bits, code] = octet
            code, before = code + 1, bits
    return _made_codes
