"""Header fields, with the examples of RFC 7541, appendix C."""

from __future__ import annotations

import pytest

from agent import hpack
from agent.hpack import Malformed, Reader, write_fields

# C.2: a literal that is kept, one that is not, one that never is, one of the table.
KEPT = "400a637573746f6d2d6b65790d637573746f6d2d686561646572"
SINGLE = {
    KEPT: (b"custom-key", b"custom-header"),
    "040c2f73616d706c652f70617468": (b":path", b"/sample/path"),
    "100870617373776f726406736563726574": (b"password", b"secret"),
    "82": (b":method", b"GET"),
}
FIRST = [
    (b":method", b"GET"),
    (b":scheme", b"http"),
    (b":path", b"/"),
    (b":authority", b"www.example.com"),
]
SECOND = [*FIRST, (b"cache-control", b"no-cache")]
THIRD = [
    (b":method", b"GET"),
    (b":scheme", b"https"),
    (b":path", b"/index.html"),
    (b":authority", b"www.example.com"),
    (b"custom-key", b"custom-value"),
]
# C.3 and C.4: three requests of one connection, plain and Huffman coded.
PLAIN = [
    "828684410f7777772e6578616d706c652e636f6d",
    "828684be58086e6f2d6361636865",
    "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565",
]
CODED = [
    "828684418cf1e3c2e5f23a6ba0ab90f4ff",
    "828684be5886a8eb10649cbf",
    "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
]
BAD = {
    "an index that is none": "80",
    "an index above the table": "be",
    "a number too large": "ffffffffffffff7f",
    "a number without an end": "ff",
    "a string without an end": "0003616263057a",
    "padding that is none": "0081000161",
    "eight bits of padding": "00821fff0161",
    "the end of a string in it": "0084ffffffff0161",
    "a table that is too large": "3fe2ff03",
}


def kept(size: int) -> bytes:
    """A field "a" for the table, with a value of so many bytes; 127 to 16510."""
    more = size - 0x7F
    return b"\x40\x01a\x7f" + bytes([more & 0x7F | 0x80, more >> 7]) + b"v" * size


@pytest.mark.parametrize(("block", "field"), SINGLE.items())
def test_a_field(block: str, field: tuple[bytes, bytes]) -> None:
    assert Reader().read(bytes.fromhex(block)) == [field]


@pytest.mark.parametrize("blocks", [PLAIN, CODED], ids=["plain", "coded"])
def test_blocks_refer_to_those_before(blocks: list[str]) -> None:
    reader = Reader()
    assert [reader.read(bytes.fromhex(block)) for block in blocks] == [FIRST, SECOND, THIRD]


def test_a_table_forgets_the_oldest() -> None:
    reader = Reader()
    reader.read(bytes.fromhex(KEPT))
    assert reader.read(b"\xbe") == [(b"custom-key", b"custom-header")]
    assert reader.read(kept(4040))[0][0] == b"a"
    assert reader.read(b"\xbe")[0][0] == b"a"
    with pytest.raises(Malformed):
        reader.read(b"\xbf")
    assert reader.read(b"\x20\x82") == [(b":method", b"GET")]  # a table of nothing
    with pytest.raises(Malformed):
        reader.read(b"\xbe")


@pytest.mark.parametrize("block", BAD.values(), ids=list(BAD))
def test_what_is_malformed_is_refused(block: str) -> None:
    with pytest.raises(Malformed):
        Reader().read(bytes.fromhex(block))


def test_a_few_octets_do_not_become_a_gigabyte() -> None:
    reader = Reader()
    assert reader.read(kept(4000)) == [(b"a", b"v" * 4000)]
    with pytest.raises(Malformed, match="more than"):
        reader.read(b"\xbe" * 300)


def test_what_is_written_is_read_again() -> None:
    fields = [(b"n" * size, bytes(range(256)) * (size // 9)) for size in (1, 126, 127, 128, 3000)]
    assert Reader().read(write_fields(fields)) == fields


def test_the_code_is_whole() -> None:
    """Kraft's sum is one where every string of bits means something."""
    codes = hpack._codes()
    assert sum(2.0**-bits for bits, _ in codes) == 1
    assert sorted(codes.values()) == list(range(257))
