"""nftables in one network namespace: libnftables in a thread of its own, else the nft binary.

The thread lives in that namespace, so what it runs is there whatever the rest of the process
does. A load of a few elements takes 1 ms in the library and 18 ms by the binary.
What stands opposite: nft.py and guardrules.py say what to load. Source: libnftables(3).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import secrets
import subprocess
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import structlog

from agent.datapath import tabledump
from agent.datapath.nft import TABLE, Ruleset, change, delta, render, renew
from agent.errors import Unsupported, VxmeshError
from agent.syscalls import CLONE_NEWNET, set_thread_name, setns

log = structlog.get_logger()

LIBRARY = "libnftables.so.1"
STATELESS = 1 << 2  # NFT_CTX_OUTPUT_STATELESS: without what counters and limits hold
# Of our threads, so that what the kernel tells of our own changes is known as that.
THREAD = f"vxmnft-{secrets.token_hex(4)}"  # 15 bytes, TASK_COMM_LEN without its end
# Its contexts are apart, but the tables of names behind them are not in every version.
_library_lock = threading.Lock()

T = TypeVar("T")
# Set -> elements of it; map -> key -> value.
Keys = Mapping[str, frozenset[str]]
Pairs = Mapping[str, Mapping[str, str]]

# In a listing: a set's elements, and what one has beside its key when the set says so.
_ELEMENTS = re.compile(r"\b(?:set|map) (\S+) \{[^{}]*?(elements = \{([^{}]*)\})")
_STATEFUL = re.compile(r" (?:limit|counter)\b.*", re.DOTALL)
_COUNTER = re.compile(r"counter (\S+) \{\s*packets (\d+)")
_COUNTED = re.compile(r"counter packets (\d+)")


class _Listing(NamedTuple):
    """A table as the kernel shows it: what order things are listed in is chance."""

    # All but the elements, sorted; where some are kept, see tabledump.py.
    words: list[str] | tabledump.Shape
    elements: dict[str, set[str]]  # set or map -> elements


class Nftables:
    """One table of ours in one namespace; `inet vxmesh` if nothing else is said."""

    def __init__(self, netns: str | Path, library: str = LIBRARY, table: str = TABLE) -> None:
        """For the namespace at path `netns`. Nothing is opened before the first call."""
        self._netns, self._table = netns, table
        self._library = library
        self._run: Callable[[str, int], str] | None = None
        self._close: Callable[[], None] = lambda: None
        self._pool = ThreadPoolExecutor(1, "nft", set_thread_name, (THREAD,))
        self._loaded: Ruleset | None = None
        self._listing = _Listing([], {})
        self._unseen = False  # what was loaded has not been listed yet

    async def load(self, ruleset: Ruleset) -> None:
        """Make the table so: elements only where this object loaded it before, else whole.

        VxmeshError if nftables refuses.
        """
        await self._in_thread(lambda: self._load(ruleset))

    async def alter(self, come: Keys | Pairs, gone: Keys | Pairs, chains: str = "") -> None:
        """Add and delete elements of sets and maps that were loaded; costs what the change is.

        The elements are to be written as nft(8) lists them. `chains` are new ones, with their
        rules, beside those that were loaded: then the table is also looked at. VxmeshError if
        nftables refuses; then `load` is to be called again.
        """
        await self._in_thread(lambda: self._alter(come, gone, chains))

    async def counters(self) -> dict[str, int]:
        """What the table's counters hold, in packets, by name; VxmeshError if it is not there."""
        text = f"list counters table {self._table}\n"
        listed = await self._in_thread(lambda: self._command(text, 0))
        return {name: int(packets) for name, packets in _COUNTER.findall(listed)}

    async def counted(self, name: str) -> dict[str, int]:
        """Of a set with counters what each element holds, in packets; VxmeshError if there is no
        such set."""
        text = f"list set {self._table} {name}\n"
        return await self._in_thread(lambda: _counts(self._command(text, 0)))

    async def check(self, told: bool = False) -> bool:
        """Whether the table is as it was loaded; if it is not, it is loaded anew.

        With `told`, somebody else has changed it, maybe before what was loaded was looked at.
        """
        return await self._in_thread(lambda: self._check(told))

    async def remove(self) -> None:
        """Delete the table; if it is not there, nothing is changed."""
        await self._in_thread(self._remove)

    def close(self) -> None:
        """End the thread. The table stays."""
        self._pool.submit(lambda: self._close())
        self._pool.shutdown(wait=True)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    # -- in the thread --

    def _load(self, ruleset: Ruleset) -> None:
        before, self._loaded = self._loaded, None
        if before is None or not self._update(before, ruleset):
            self._replace(ruleset)
        self._unseen |= before is None or before != ruleset
        self._loaded = ruleset
        if self._run is _run_binary:
            self._see()  # of what others change before that nobody tells, see `_check`
            return
        with contextlib.suppress(RuntimeError):  # it is being closed
            self._pool.submit(self._see)  # 1 ms and more, which nobody has to wait for

    def _see(self) -> None:
        """Have the kernel's own words for what was loaded."""
        if self._unseen and self._loaded:
            self._listing = self._list(self._loaded)
            self._unseen = False

    def _replace(self, ruleset: Ruleset) -> None:
        """The whole table, but for elements that are to be kept, if it can be kept."""
        if ruleset.kept:
            there = tabledump.read(self._netns, self._table)
            if there.sets >= ruleset.kept:
                try:
                    self._command(renew(ruleset, there.chains, there.sets))
                except VxmeshError as error:
                    # The table is that of another version.
                    log.warning("nft.not_kept", netns=str(self._netns), error=str(error))
                else:
                    return
        self._command(render(ruleset))

    def _remove(self) -> None:
        table, self._loaded = self._table, None
        if f"table {table}" in self._command("list tables\n").splitlines():
            self._command(f"table {table}\ndelete table {table}\n")

    def _alter(self, come: Keys | Pairs, gone: Keys | Pairs, chains: str) -> None:
        self._see()
        ruleset = self._loaded
        if ruleset is None:
            raise VxmeshError("firewall rules", "could not be loaded before")
        sets, lines = dict(ruleset.sets), []
        if chains:
            ruleset = self._loaded = replace(ruleset, chains=ruleset.chains + chains)
            lines.append(f"table {self._table} {{{chains}}}")
        for name in come.keys() | gone.keys():
            elements = sets[name].elements
            assert isinstance(elements, dict)
            out, new = _pairs(gone.get(name)), _pairs(come.get(name))
            lines += change("delete", self._table, name, out)
            lines += change("add", self._table, name, new)
            for key in out:
                elements.pop(key, None)
            elements.update(new)
            listed = self._listing.elements.pop(name, set())
            listed.difference_update(map(_listed, out.items()))
            listed.update(map(_listed, new.items()))
            if listed:
                self._listing.elements[name] = listed
        if not lines:
            return
        try:
            self._command("".join(f"{line}\n" for line in lines))
        except VxmeshError as error:
            # Somebody else has changed the table: the whole of it, as after `check`.
            log.warning("nft.delta_refused", netns=str(self._netns), error=str(error))
            self._loaded = None
            self._load(ruleset)
            return
        if chains:
            self._listing = self._list(ruleset)

    def _update(self, before: Ruleset, ruleset: Ruleset) -> bool:
        """Change the elements only; False if that is not all, or nftables will not."""
        if before.chains != ruleset.chains:
            return False
        text = delta(before, ruleset)
        if not text:
            return True
        try:
            self._command(text)
        except VxmeshError as error:
            # Somebody else has changed the table, or this version cannot do that change.
            log.warning("nft.delta_refused", netns=str(self._netns), error=str(error))
            return False
        return True

    def _check(self, told: bool) -> bool:
        self._see()
        ruleset = self._loaded
        if ruleset is None:
            return True
        there = self._list(ruleset)
        same = there == self._listing
        # The binary is not our thread: of what it changes we are told, and would go on for ever.
        if not same or (told and self._run is not _run_binary):
            self._loaded = None
            self._load(ruleset)
            if same:  # as it was seen, which may have been after somebody else had changed it
                self._see()
                same = there == self._listing
        return same

    def _list(self, ruleset: Ruleset) -> _Listing:
        """The table as it is; without a word if it is not there."""
        if ruleset.kept:
            return self._list_kept(ruleset)
        text = self._show(f"table {self._table}")
        rest = _ELEMENTS.sub(lambda found: found[0].replace(found[2], ""), text)
        return _Listing(sorted(rest.split()), _elements(text))

    def _list_kept(self, ruleset: Ruleset) -> _Listing:
        """The same without elements that are kept: set by set, or the library reads them all."""
        shape = tabledump.read(self._netns, self._table)
        elements: dict[str, set[str]] = {}
        for name in sorted(shape.sets & (ruleset.sets.keys() - ruleset.kept)):
            kind = ruleset.sets[name].declaration.split()[0]
            elements |= _elements(self._show(f"{kind} {self._table} {name}"))
        return _Listing(shape, elements)

    def _show(self, what: str) -> str:
        """What nft lists; nothing if it is not there."""
        try:
            return self._command(f"list {what}\n")
        except VxmeshError:
            return ""

    def _command(self, text: str, flags: int = STATELESS) -> str:
        if self._run is None:
            fd = os.open(self._netns, os.O_RDONLY | os.O_CLOEXEC)
            try:
                setns(fd, CLONE_NEWNET)
            finally:
                os.close(fd)
            try:
                self._run, self._close = _open_library(self._library)
            except OSError as error:
                log.info("nft.binary", why=str(error))
                self._run = _run_binary
        return self._run(text, flags)


def _pairs(elements: frozenset[str] | Mapping[str, str] | None) -> dict[str, str]:
    return dict(elements) if isinstance(elements, Mapping) else dict.fromkeys(elements or (), "")


def _counts(text: str) -> dict[str, int]:
    """Element -> packets, of a set as it is listed with its counters."""
    found = {}
    for _, _, inside in _ELEMENTS.findall(text):
        for element in inside.split(","):
            if packets := _COUNTED.search(element):
                key = " ".join(_STATEFUL.sub("", element).split())
                found[key.strip('"')] = int(packets[1])
    return found


def _elements(text: str) -> dict[str, set[str]]:
    """Set or map -> the elements that a listing shows of it, for those that have any."""
    found = {}
    for name, _, inside in _ELEMENTS.findall(text):
        keys = (_STATEFUL.sub("", key) for key in inside.split(","))
        found[name] = {" ".join(key.split()) for key in keys}
    return found


def _listed(element: tuple[str, str]) -> str:
    """An element as nft lists it, without what one has beside its key."""
    key, value = element
    if " limit" in key or " counter" in key:
        key = _STATEFUL.sub("", key)
    return f"{key} : {value}" if value else key


def run_here(text: str, quiet: bool = False) -> str:
    """Run commands once in the calling thread's namespace, and what they print.

    VxmeshError if nftables refuses; with `quiet`, nothing is then printed. The thread gets a
    name that tells the kernel's listeners that it is ours.
    """
    set_thread_name(THREAD)
    try:
        run, close = _open_library(LIBRARY)
    except OSError:
        run, close = _run_binary, lambda: None
    try:
        return run(text, STATELESS)
    except VxmeshError:
        if not quiet:
            raise
        return ""
    finally:
        close()


def _open_library(name: str) -> tuple[Callable[[str, int], str], Callable[[], None]]:
    """How to run commands with libnftables in the calling thread's namespace, and how to end."""
    library: Any = ctypes.CDLL(name)
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_get_output_buffer.restype = ctypes.c_char_p
    library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
    with _library_lock:
        context = ctypes.c_void_p(library.nft_ctx_new(0))
        library.nft_ctx_buffer_output(context)
        library.nft_ctx_buffer_error(context)

    def run(text: str, flags: int) -> str:
        with _library_lock:
            library.nft_ctx_output_set_flags(context, flags)
            status = library.nft_run_cmd_from_buffer(context, text.encode())
            output = library.nft_ctx_get_output_buffer(context) or b""
            errors = library.nft_ctx_get_error_buffer(context) or b""
        if status != 0:
            raise _refused(errors.decode(errors="replace"))
        return str(output.decode(errors="replace"))

    def close() -> None:
        with _library_lock:
            library.nft_ctx_free(context)

    return run, close


def _run_binary(text: str, flags: int) -> str:
    """Run commands with the nft binary; a child begins in its parent *thread's* namespace."""
    try:
        stateless = ["-s"] if flags & STATELESS else []
        done = subprocess.run(
            ["nft", *stateless, "-f", "-"], input=text, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise Unsupported(
            "firewall rules",
            "neither libnftables nor the nft command is there",
            "Install nftables",
        ) from None
    if done.returncode != 0:
        raise _refused(done.stderr)
    return done.stdout


def _refused(text: str) -> VxmeshError:
    lines = [line for line in text.splitlines() if "rror" in line] or ["no reason given"]
    return VxmeshError(
        "firewall rules", f"nftables refused them ({lines[0]})", "See 'nft list ruleset'"
    )
