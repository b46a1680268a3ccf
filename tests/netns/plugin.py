"""A network plugin as Docker's are: HTTP on a unix socket, veth pairs on a bridge of its own.

python plugin.py SOCKET [BREAK…]     each BREAK is a way to fail, such as lie:Join or die:Join
"""

from __future__ import annotations

import json
import os
import socketserver
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

BRIDGE = "weird0"
BREAKS = set(sys.argv[2:])


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def answer(method: str, body: dict[str, Any]) -> dict[str, Any]:
    verb = method.rpartition(".")[2]
    if f"die:{verb}" in BREAKS:
        os._exit(1)
    if f"refuse:{verb}" in BREAKS:
        return {"Err": "not today"}
    if verb == "Activate":
        return {"Implements": ["NetworkDriver"]}
    if verb == "GetCapabilities":
        return {"Scope": "local", "Surplus": [1, 2]}
    if verb == "CreateNetwork":
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", body["IPv4Data"][0]["Gateway"], "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
    if verb == "DeleteNetwork":
        ip("link", "del", BRIDGE)
    end = body.get("EndpointID", "")[:8]
    if verb == "CreateEndpoint":
        return {"Interface": {"MacAddress": f"02:42:{end[:2]}:{end[2:4]}:{end[4:6]}:{end[6:8]}"}}
    if verb == "DeleteEndpoint":
        subprocess.run(["ip", "link", "del", f"wo{end}"], capture_output=True)
    if verb == "Join":
        if "lie:Join" in BREAKS:
            return {"InterfaceName": {"SrcName": "nowhere", "DstPrefix": "eth"}}
        ip("link", "add", f"wo{end}", "type", "veth", "peer", "name", f"wi{end}")
        ip("link", "set", f"wo{end}", "master", BRIDGE, "up")
        gateway = json.loads(subprocess.check_output(["ip", "-j", "-4", "addr", "show", BRIDGE]))
        return {
            "InterfaceName": {"SrcName": f"wi{end}", "DstPrefix": "weird"},
            "Gateway": gateway[0]["addr_info"][0]["local"],
            "StaticRoutes": [{"Destination": "192.0.2.0/24", "RouteType": 1}],
        }
    return {}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size) or b"{}")
        assert self.headers["Accept"] == "application/vnd.docker.plugins.v1.2+json"
        with Path(sys.argv[1] + ".log").open("a") as file:
            file.write(self.path.rpartition(".")[2] + "\n")
        try:
            found, status = answer(self.path[1:], body), 200
        except subprocess.CalledProcessError as error:
            found, status = {"Err": error.stderr.decode()}, 500
        text = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Not to the test's own output."""


if __name__ == "__main__":
    Path(sys.argv[1]).unlink(missing_ok=True)
    with socketserver.ThreadingUnixStreamServer(sys.argv[1], Handler) as server:
        server.serve_forever()
