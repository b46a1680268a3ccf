"""Certificates of people and programs that use agents over TCP: what is in one.

A user is named by URIs among a certificate's names (RFC 5280, subjectAltName): `vxmesh:user:NAME`,
`vxmesh:right:read` or `:change`, and `vxmesh:cluster:ID`. A node's certificate has none of these
and so controls nothing, though the same CA issued it; a user's has no node's name and so is no
peer. What stands opposite: cluster/identity/users.py issues them, api/tlsfront.py believes
them, client.py shows one.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509

from agent.errors import Invalid
from agent.notation import parse_name
from agent.unreadable import UNREADABLE

USER, RIGHT, CLUSTER = "vxmesh:user:", "vxmesh:right:", "vxmesh:cluster:"
RIGHTS = ("read", "change")
NONE = "names no user that may control agents"
FIX = "Have one issued: 'vxmesh cluster user NAME'"


@dataclass(frozen=True, slots=True)
class User:
    """Whom a certificate names. `right` is one of RIGHTS."""

    cluster: str
    name: str
    right: str

    def names(self) -> x509.SubjectAlternativeName:
        """For the certificate."""
        uris = (USER + self.name, RIGHT + self.right, CLUSTER + self.cluster)
        return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])


def read_user(certificate: x509.Certificate) -> User:
    """Whom a certificate names; Invalid if it is no user. Who signed it is not looked at."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except UNREADABLE:
        raise Invalid("certificate", NONE, FIX) from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    found = []
    for prefix in (CLUSTER, USER, RIGHT):
        values = [uri.removeprefix(prefix) for uri in uris if uri.startswith(prefix)]
        if len(values) != 1:  # two would leave open which one counts
            raise Invalid("certificate", NONE, FIX)
        found += values
    cluster, name, right = found
    if right not in RIGHTS or not is_name(name):
        raise Invalid("certificate", NONE, FIX)
    return User(cluster, name, right)


def is_name(name: str) -> bool:
    """Whether a user can have that name."""
    try:
        return parse_name(name, "user") == name
    except Invalid:
        return False
