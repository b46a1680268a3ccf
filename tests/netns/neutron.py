"""As much of OpenStack's Neutron as kuryr-libnetwork asks for: networks, subnets, subnet pools and
ports with their tags, kept in memory. GET /left tells what there is of each.

python neutron.py PORT
Source: OpenStack's Networking API, v2.0.
"""

from __future__ import annotations

import ipaddress
import json
import sys
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Thing = dict[str, Any]

KINDS: dict[str, dict[str, Thing]] = {
    "networks": {}, "subnets": {}, "subnetpools": {}, "ports": {}, "security-groups": {},
}  # fmt: skip


def made(kind: str, given: Thing) -> Thing:
    """A thing of a kind, with what Neutron adds."""
    thing = {"id": str(uuid.uuid4()), "tags": [], "project_id": "p", "tenant_id": "p", **given}
    if kind == "networks":
        thing.setdefault("mtu", 1450)
    if kind == "subnets":
        first = ipaddress.ip_network(thing["cidr"]).network_address + 1
        thing.setdefault("gateway_ip", str(first))
        thing.setdefault("host_routes", [])
    if kind == "ports":
        number = uuid.uuid4().hex
        thing = {
            "device_id": "",
            "device_owner": "",
            "status": "ACTIVE",
            "mac_address": f"fa:16:3e:{number[:2]}:{number[2:4]}:{number[4:6]}",
            "binding:host_id": "",
            "binding:vif_type": "bridge",
            **thing,
        }
        thing["fixed_ips"] = [fixed(ip) for ip in thing.get("fixed_ips", [])]
    KINDS[kind][thing["id"]] = thing
    return thing


def fixed(wanted: Thing) -> Thing:
    """An address of a subnet: the one that is wanted, or a free one."""
    subnet = KINDS["subnets"][wanted["subnet_id"]]
    taken = {subnet["gateway_ip"]}
    taken |= {ip["ip_address"] for port in KINDS["ports"].values() for ip in port["fixed_ips"]}
    hosts = map(str, ipaddress.ip_network(subnet["cidr"]).hosts())
    address = wanted.get("ip_address") or next(host for host in hosts if host not in taken)
    if address in taken:
        raise Refused(409, "IpAddressAlreadyAllocated", f"{address} is taken")
    return {"subnet_id": subnet["id"], "ip_address": address}


def fits(thing: Thing, query: dict[str, list[str]]) -> bool:
    """Whether a thing is among those that a query lists."""
    for key, values in query.items():
        if key == "tags":
            if not set(",".join(values).split(",")) <= set(thing["tags"]):
                return False
        elif key == "fixed_ips":
            for field in ("ip_address", "subnet_id"):
                some = {v.partition("=")[2] for v in values if v.startswith(field)}
                if some and not some & {ip[field] for ip in thing["fixed_ips"]}:
                    return False
        elif str(thing.get(key, "")) not in values:
            return False
    return True


class Refused(Exception):
    """Status, type and message of an error."""


def answer(method: str, path: list[str], query: dict[str, list[str]], body: Thing) -> Thing | None:
    kind, rest = path[0].removesuffix(".json"), [part.removesuffix(".json") for part in path[1:]]
    if kind == "extensions":
        return {"extension": {"alias": rest[0]}}
    things = KINDS[kind]
    one = kind.removesuffix("s").replace("-", "_")
    many = kind.replace("-", "_")
    if not rest and method == "GET":
        return {many: [thing for thing in things.values() if fits(thing, query)]}
    if not rest:
        if many in body:
            return {many: [made(kind, given) for given in body[many]]}
        return {one: made(kind, body[one])}
    if rest[0] not in things:
        raise Refused(404, "NotFound", f"{kind} {rest[0]} could not be found")
    thing = things[rest[0]]
    if len(rest) == 3:
        tags = set(thing["tags"])
        thing["tags"] = sorted(tags | {rest[2]} if method == "PUT" else tags - {rest[2]})
        return None
    if method == "PUT":
        thing.update(body[one])
    if method == "DELETE":
        used = kind == "subnets" and any(
            ip["subnet_id"] == rest[0] for p in KINDS["ports"].values() for ip in p["fixed_ips"]
        )
        if used:
            raise Refused(409, "SubnetInUse", "it has ports")
        del things[rest[0]]
        return None
    return {one: thing}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _do(self) -> None:
        url = urlsplit(self.path)
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size) or b"{}")
        found: Thing | None
        if url.path == "/left":
            found, status = {kind: list(things.values()) for kind, things in KINDS.items()}, 200
        else:
            try:
                path = url.path.removeprefix("/v2.0/").split("/")
                found = answer(self.command, path, parse_qs(url.query), body)
                status = {"POST": 201}.get(self.command, 200 if found else 204)
            except Refused as error:
                status, kind, text = error.args
                found = {"NeutronError": {"type": kind, "message": text, "detail": ""}}
        text = json.dumps(found).encode() if found is not None else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = do_DELETE = _do

    def log_message(self, format: str, *args: object) -> None:
        """Not to the test's own output."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
