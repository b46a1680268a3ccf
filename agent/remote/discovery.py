"""Where a plugin listens, by its name, in the directories in which plugins say so.

NAME.sock is a unix socket; NAME.spec is a line with a URL; NAME.json is Addr and TLSConfig. Each
may also be in a directory of that name. Sockets come first, as in Docker.
Source: Docker's plugin discovery (docs/extend/plugin_api.md).
What stands opposite: client.py, which connects.
"""

from __future__ import annotations

import re
import ssl
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from agent.errors import Invalid, NotFound

SPEC_BYTES_MAX = 64 << 10
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}\Z")


class _Tls(msgspec.Struct):
    InsecureSkipVerify: bool = False
    CAFile: str = ""
    CertFile: str = ""
    KeyFile: str = ""


class _Spec(msgspec.Struct):
    Addr: str
    TLSConfig: _Tls | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a plugin listens."""

    socket: str  # path; empty: at `url`
    url: str  # without a path; of a socket, what HTTP wants to have as a host
    tls: ssl.SSLContext | None = None


def find(name: str, directories: Sequence[str]) -> Place:
    """Where the plugin `name` listens. NotFound, or Invalid if what says so cannot be used."""
    if not _NAME.match(name):
        raise Invalid(f"plugin {name[:40]!r}", "is no plugin's name", "Use letters and digits")
    for ending in (".sock", ".spec", ".json"):
        for directory in directories:
            for path in (Path(directory, name + ending), Path(directory, name, name + ending)):
                if ending == ".sock":
                    if _is_socket(path):
                        return Place(str(path), "http://plugin")
                elif path.is_file():
                    return _read(name, path)
    raise NotFound(
        f"plugin {name}",
        f"is not in {', '.join(directories)} as {name}.sock, .spec or .json",
        "Start it, and see where it puts its socket",
    )


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return False


def _read(name: str, path: Path) -> Place:
    try:
        with path.open("rb") as file:
            text = file.read(SPEC_BYTES_MAX)
        if path.suffix == ".json":
            spec = msgspec.json.decode(text, type=_Spec)
        else:
            spec = _Spec(text.decode().strip())
        return _place(spec)
    except (OSError, ValueError, ssl.SSLError, msgspec.MsgspecError) as error:
        raise Invalid(f"plugin {name}", f"is misdescribed in {path} ({error})", "Mend it") from None


def _place(spec: _Spec) -> Place:
    url = urlsplit(spec.Addr)
    if url.scheme == "unix":
        return Place(url.path, "http://plugin")
    if url.scheme not in ("tcp", "http", "https") or not url.hostname:
        raise ValueError(f"address {spec.Addr[:80]!r} is none of unix, tcp, http and https")
    if spec.TLSConfig is None:
        return Place("", f"{'https' if url.scheme == 'https' else 'http'}://{url.netloc}")
    tls = spec.TLSConfig
    context = ssl.create_default_context(cafile=tls.CAFile or None)
    if tls.InsecureSkipVerify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if tls.CertFile:
        context.load_cert_chain(tls.CertFile, tls.KeyFile or None)
    return Place("", f"https://{url.netloc}", context)
