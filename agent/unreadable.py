"""What cryptography raises on certificates and keys that somebody else has made.

Besides InvalidSignature: they are malformed, of an algorithm or curve that it does not know, or
have extensions that cannot be. Whoever reads such bytes catches all of these.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
