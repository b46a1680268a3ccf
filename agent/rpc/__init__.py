"""Generated from proto/ by scripts/generate.sh; never edited, but for this file."""

from __future__ import annotations

import google.protobuf.internal
from google.protobuf.internal import api_implementation


class _Later:
    """A module of protobuf's, loaded once somebody wants anything of it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> object:
        from importlib import import_module

        return getattr(import_module(self._name), attribute)


# The part that does in Python what C does where that is there. Generated code loads it all the
# same, 15 ms that are a seventh of what a command takes, and calls nothing of it.
_PYTHON = "python_message"
if api_implementation.Type() != "python" and not hasattr(google.protobuf.internal, _PYTHON):
    setattr(google.protobuf.internal, _PYTHON, _Later(f"google.protobuf.internal.{_PYTHON}"))
