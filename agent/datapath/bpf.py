"""bpf(2): maps, programs, and the links that have programs run for all processes of a host.

Everything here lives as long as its descriptor, so that nothing is left of an agent that ended,
however it did. What stands opposite: socketprograms.py and shortcutprograms.py say what is loaded;
socketbalancer.py, shortcuts.py.
Source: bpf(2), linux/bpf.h (union bpf_attr); fsopen(2), fsmount(2); Linux bpf/btf.rst.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from errno import ENOENT, ENOSPC, ENOSYS

from agent.datapath import bpfasm
from agent.datapath.bpfasm import ARRAY, HASH, SK_STORAGE, MapSpec

_NR_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}
_NR_FSOPEN, _NR_FSCONFIG, _NR_FSMOUNT = 430, 431, 432  # on every architecture; Linux 5.2
# enum bpf_cmd
MAP_CREATE, MAP_UPDATE, MAP_DELETE, PROG_LOAD, OBJ_INFO, BTF_LOAD = 0, 2, 3, 5, 15, 18
LOOKUP_BATCH, UPDATE_BATCH, DELETE_BATCH, LINK_CREATE = 24, 26, 27, 28
SCHED_CLS, CGROUP_SOCK_ADDR = 3, 18  # enum bpf_prog_type
NO_PREALLOC, MMAPABLE = 1, 1 << 10
LICENSE = b"Apache-2.0\0"
LOG_SIZE = 1 << 20
ATTRIBUTES = 128  # bytes of union bpf_attr that we fill in, and nought; none is longer than known
TOGETHER = 4096  # elements that are read at once
_FSCONFIG_CREATE, _CLOEXEC = 6, 1

_libc = ctypes.CDLL(None, use_errno=True)


def _address(buffer: object) -> int:
    return ctypes.addressof(buffer)  # type: ignore[arg-type]


def _syscall(what: str, number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{what}: {os.strerror(errno)}")
    return result


def _call(what: str, command: int, buffer: ctypes.Array[ctypes.c_char]) -> int:
    """bpf(2) with the attributes in `buffer`, where the kernel may leave some. OSError."""
    number = _NR_BPF.get(os.uname().machine)
    if number is None:
        raise OSError(ENOSYS, f"{what}: not known on this architecture")
    return _syscall(what, number, command, ctypes.byref(buffer), ATTRIBUTES)


def _bpf(what: str, command: int, attributes: bytes) -> int:
    return _call(what, command, ctypes.create_string_buffer(attributes, ATTRIBUTES))


class Map:
    """A map of the kernel's: keys and values of fixed sizes."""

    def __init__(self, name: str, spec: MapSpec, btf: int = 0) -> None:
        """Make one. `btf` describes the values of sockets' notes. OSError."""
        self.name, self.spec = name, spec
        flags = {HASH: NO_PREALLOC, SK_STORAGE: NO_PREALLOC, ARRAY: MMAPABLE}.get(spec.kind, 0)
        attributes = struct.pack(
            "=5I2I16sI3I", spec.kind, spec.key, spec.value, spec.entries, flags,
            0, 0, f"vxmesh_{name}".encode()[:15], 0, btf, *((1, 2) if btf else (0, 0)),
        )  # fmt: skip
        self.fd = _bpf(f"map {name}", MAP_CREATE, attributes)

    def close(self) -> None:
        """It is gone once no program has it either."""
        os.close(self.fd)

    def update(self, elements: Mapping[bytes, bytes]) -> None:
        """Set elements, each at once. OSError."""
        if elements:
            self._batch(
                UPDATE_BATCH, b"".join(elements), b"".join(elements.values()), len(elements)
            )

    def delete(self, keys: Collection[bytes]) -> None:
        """Take elements out; fine if they are gone. OSError."""
        if not keys:
            return
        try:
            self._batch(DELETE_BATCH, b"".join(keys), b"", len(keys))
        except OSError as error:
            if error.errno != ENOENT:
                raise
            for key in keys:  # it ends at the first that is missing
                self.drop(key)

    def put(self, key: bytes, value: bytes) -> None:
        """Set one element; of a map whose values are programs, to that of a descriptor. OSError."""
        held = ctypes.create_string_buffer(key, len(key))
        given = ctypes.create_string_buffer(value, len(value))
        attributes = struct.pack("=2I3Q", self.fd, 0, _address(held), _address(given), 0)
        _bpf(f"map {self.name}", MAP_UPDATE, attributes)

    def drop(self, key: bytes) -> None:
        """Take one element out; fine if it is gone. OSError."""
        held = ctypes.create_string_buffer(key, len(key))
        attributes = struct.pack("=2I3Q", self.fd, 0, _address(held), 0, 0)
        try:
            _bpf(f"map {self.name}", MAP_DELETE, attributes)
        except OSError as error:
            if error.errno != ENOENT:
                raise

    def _batch(self, command: int, keys: bytes, values: bytes, count: int) -> None:
        held = ctypes.create_string_buffer(keys, len(keys))
        given = ctypes.create_string_buffer(values, len(values)) if values else None
        attributes = struct.pack(
            "=4Q2I2Q", 0, 0, _address(held), _address(given) if given else 0, count, self.fd, 0, 0
        )
        _bpf(f"map {self.name}", command, attributes)

    def read(self) -> dict[bytes, bytes]:
        """All elements. OSError."""
        size, width = self.spec.key, self.spec.value
        found: dict[bytes, bytes] = {}
        most = TOGETHER
        place = ctypes.create_string_buffer(max(size, 4))
        is_first = True
        while True:
            keys = ctypes.create_string_buffer(size * most)
            values = ctypes.create_string_buffer(width * most)
            attributes = struct.pack(
                "=4Q2I2Q", 0 if is_first else _address(place), _address(place),
                _address(keys), _address(values), most, self.fd, 0, 0,
            )  # fmt: skip
            buffer = ctypes.create_string_buffer(attributes, ATTRIBUTES)
            is_last = False
            try:
                _call(f"map {self.name}", LOOKUP_BATCH, buffer)
            except OSError as error:
                if error.errno == ENOSPC:  # a row of the table has more than was asked for
                    most *= 2
                    continue
                if error.errno != ENOENT:
                    raise
                is_last = True
            (count,) = struct.unpack_from("=I", buffer.raw, 32)
            raw, held = keys.raw, values.raw
            for at in range(count):
                found[raw[at * size : at * size + size]] = held[at * width : at * width + width]
            if is_last:
                return found
            is_first = False


def describe_notes(size: int) -> int:
    """The descriptor of what says that notes are `size` bytes: sockets' maps must have it (BTF).

    Type 1 is a number of four bytes, type 2 an array of `size` numbers of one byte (type 3).
    """
    names = b"\0int\0char\0"
    types = struct.pack("=3II", 1, 1 << 24, 4, 1 << 24 | 32)  # int, signed
    types += struct.pack("=3I3I", 0, 3 << 24, 0, 3, 1, size)  # array
    types += struct.pack("=3II", 5, 1 << 24, 1, 8)  # char
    header = struct.pack("=HBB5I", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names))
    data = header + types + names
    buffer = ctypes.create_string_buffer(data, len(data))
    return _bpf("btf", BTF_LOAD, struct.pack("=2Q3I", _address(buffer), 0, len(data), 0, 0))


def load(
    name: str,
    lines: bpfasm.Lines,
    maps: Mapping[str, int],
    kind: int,
    attach_type: int = 0,
) -> int:
    """The descriptor of a program, once the kernel has verified it. OSError says what it minds."""
    program = bpfasm.assemble(lines, maps)
    code = ctypes.create_string_buffer(program, len(program))
    license = ctypes.create_string_buffer(LICENSE, len(LICENSE))

    def attributes(log: Sequence[int]) -> bytes:
        return struct.pack(
            "=2I2Q2IQ2I16s2I", kind, len(program) // bpfasm.SIZE, _address(code),
            _address(license), *log, 0, 0, name.encode()[:15], 0, attach_type,
        )  # fmt: skip

    try:
        return _bpf(f"program {name}", PROG_LOAD, attributes((0, 0, 0)))
    except OSError as error:
        report = ctypes.create_string_buffer(LOG_SIZE)
        try:
            fd = _bpf(name, PROG_LOAD, attributes((1, LOG_SIZE, _address(report))))
        except OSError:
            said = report.value.decode(errors="replace").strip().splitlines()[-3:]
            raise OSError(error.errno, " / ".join([str(error.strerror), *said])) from None
        return fd


def open_cgroups() -> int:
    """A descriptor of the root of the unified hierarchy, which need not be mounted. OSError."""
    made = _syscall("fsopen cgroup2", _NR_FSOPEN, b"cgroup2", _CLOEXEC)
    try:
        _syscall("fsconfig cgroup2", _NR_FSCONFIG, made, _FSCONFIG_CREATE, None, None, 0)
        return _syscall("fsmount cgroup2", _NR_FSMOUNT, made, _CLOEXEC, 0)
    finally:
        os.close(made)


def attach(name: str, program: int, cgroup: int, attach_type: int) -> int:
    """The descriptor of a link: while it is open, the program runs for all in the cgroup."""
    attributes = struct.pack("=4I", program, cgroup, attach_type, 0)
    return _bpf(f"link {name}", LINK_CREATE, attributes)


def is_attached(link: int) -> bool:
    """Whether a link still holds: others may detach it. OSError."""
    info = ctypes.create_string_buffer(128)  # struct bpf_link_info: type, id, prog_id, …
    _bpf("link", OBJ_INFO, struct.pack("=2IQ", link, 128, _address(info)))
    (cgroup,) = struct.unpack_from("=Q", info.raw, 16)
    return bool(cgroup)


def id_of(program: int) -> int:
    """The number by which the kernel knows a program, and tells of it. OSError."""
    info = ctypes.create_string_buffer(128)  # struct bpf_prog_info: type, id, …
    _bpf("program", OBJ_INFO, struct.pack("=2IQ", program, 128, _address(info)))
    return int(struct.unpack_from("=I", info.raw, 4)[0])


def close_all(descriptors: Iterable[int]) -> None:
    """Close them."""
    for fd in descriptors:
        os.close(fd)
