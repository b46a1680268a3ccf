"""How many bytes a session's message takes on a stream, without encoding it.

A thousand nodes say 13,000 summaries a second; a test holds this to what cluster/codec.py makes.
"""

from __future__ import annotations

from agent.core.plumtree import Graft, Have, Prune
from agent.core.replica import Delta
from agent.core.session import Applied, Digest, Hello, Message
from agent.core.stability import Seen
from agent.core.summary import BUCKETS, Summary

CLOCKS = 27  # three doubles with their tags
ORIGIN = 18  # an id of 16 digits, tag and length
SEAL = 76  # signature, two versions below 2^14, tags and lengths
ENTRY = 2 + ORIGIN + 2  # and a version below 128, all in a message of its own


def size_of(message: Message) -> int:
    """Bytes of a message, give or take what its varints do."""
    match message:
        case Summary():
            return 8 * BUCKETS + CLOCKS + 6
        case Digest():
            return ENTRY * len(message.entries) + CLOCKS + 4
        case Delta():
            records = sum(len(key) + len(value) + 8 for key, _, value in message.records)
            seals = sum(len(seal.leaves) + SEAL for seal in message.seals)
            return records + seals + len(message.certificate) + ORIGIN + 8
        case Seen():
            return (ENTRY + 9) * len(message.entries) + 4  # and the sum of the hashes
        case Have() | Graft():
            return ENTRY * len(message.entries) + 4
        case Prune():
            return ORIGIN * len(message.origins) + 3
        case Applied():
            return 4
        case Hello():
            return 2 * ORIGIN + len(message.boot) + len(message.version) + 6
