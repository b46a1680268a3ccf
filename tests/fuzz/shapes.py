"""Messages and structs with hostile values, made from what describes their form.

protobuf's descriptors and msgspec's types say which fields there are; so a field that is added
is fuzzed from that day on. Only the values that must fit to be heard at all (ids of nodes and
networks that exist) are given: `Known`.
"""

from __future__ import annotations

import functools
import random
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message

from tests.fuzz.inputs import ADDRESSES, FLOATS, MACS, number, text

M = TypeVar("M", bound=Message)
S = TypeVar("S", bound=msgspec.Struct)

_INTEGERS = {
    Field.TYPE_UINT32: 32, Field.TYPE_UINT64: 64, Field.TYPE_FIXED32: 32, Field.TYPE_FIXED64: 64,
    Field.TYPE_INT32: 31, Field.TYPE_INT64: 63, Field.TYPE_SINT32: 31,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Known:
    """Values that mean something to the target: field name -> what it may be. "": for any."""

    values: dict[str, Sequence[Any]]

    def of(self, field: str) -> Sequence[Any]:
        """Those for a field."""
        return self.values.get(field, self.values.get("", ()))


NOTHING = Known({})


def input_of(method: Any) -> type[Message]:
    """The class of a method's requests."""
    found: type[Message] = method.input_type._concrete_class
    return found


def message(kind: type[M], rng: random.Random, known: Known = NOTHING, depth: int = 3) -> M:
    """A message with some of its fields set."""
    made = kind()
    fields: list[Any] = list(kind.DESCRIPTOR.fields)
    oneof: Any
    for oneof in kind.DESCRIPTOR.oneofs:
        chosen = rng.choice(list(oneof.fields))
        fields = [f for f in fields if f.containing_oneof is not oneof or f is chosen]
    for field in fields:
        if rng.random() < 0.15 and field.containing_oneof is None:
            continue
        _fill(made, field, rng, known, depth)
    return made


def _fill(made: Message, field: Any, rng: random.Random, known: Known, depth: int) -> None:
    value = getattr(made, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        for _ in range(_count(rng)):
            value[text(rng, known.of("key"))] = text(rng)
    elif field.message_type is not None:
        if depth == 0:
            return
        kind = type(value) if not field.is_repeated else field.message_type._concrete_class
        if field.is_repeated:
            value.extend(message(kind, rng, known, depth - 1) for _ in range(_count(rng)))
        else:
            value.CopyFrom(message(kind, rng, known, depth - 1))
    elif field.is_repeated:
        value.extend(_scalar(field, rng, known) for _ in range(_count(rng)))
    else:
        setattr(made, field.name, _scalar(field, rng, known))


def _count(rng: random.Random) -> int:
    return rng.choice((0, 1, 1, 2, 3, 64 if rng.random() < 0.05 else 4))


def _scalar(field: Any, rng: random.Random, known: Known) -> Any:
    kind = (
        str if field.type == Field.TYPE_STRING else bytes if field.type == Field.TYPE_BYTES
        else float if field.type == Field.TYPE_DOUBLE else int
    )  # fmt: skip
    values = [each for each in known.of(field.name) if isinstance(each, kind)]
    if values and rng.random() < 0.8:
        return rng.choice(values)
    if field.type == Field.TYPE_STRING:
        return text(rng)
    if field.type == Field.TYPE_BYTES:
        return rng.choice((*ADDRESSES, rng.randbytes(rng.randrange(20))))
    if field.type == Field.TYPE_BOOL:
        return rng.random() < 0.5
    if field.type in (Field.TYPE_DOUBLE, Field.TYPE_FLOAT):
        return rng.choice(FLOATS)
    return number(rng, _INTEGERS[field.type])


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def struct(kind: type[S], rng: random.Random, known: Known = NOTHING) -> S:
    """A struct of the right types, whose values may be anything."""
    hints = _hints(kind)
    return kind(**{
        f.name: value(hints[f.name], f.name, rng, known) for f in msgspec.structs.fields(kind)
    })  # fmt: skip


def value(hint: Any, name: str, rng: random.Random, known: Known = NOTHING) -> Any:
    """A value of a type; `name` is the field's that it is for."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    values = [each for each in known.of(name) if type(each) is (origin or hint)]
    if values and rng.random() < 0.85:
        return rng.choice(values)
    if origin in (typing.Union, types.UnionType):
        return value(rng.choice(arguments), name, rng, known)
    if origin is dict:
        return {text(rng): text(rng) for _ in range(_count(rng))}
    if origin is tuple and arguments[-1:] == (Ellipsis,):
        return tuple(value(arguments[0], name, rng, known) for _ in range(_count(rng)))
    if origin is tuple:
        return tuple(value(each, name, rng, known) for each in arguments)
    if origin is not None:  # Sequence and the like
        return [value(arguments[0], name, rng, known) for _ in range(_count(rng))]
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return struct(hint, rng, known)
    if hint is bytes:
        return rng.choice(MACS if name == "mac" else ADDRESSES)
    if hint is str:
        return text(rng)
    if hint is bool:
        return rng.random() < 0.5
    if hint is float:
        return rng.choice(FLOATS)
    if hint is int:
        return number(rng) - rng.choice((0, 0, 0, 1 << 63))
    return None
