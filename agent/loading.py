"""The collector rests while a process loads what it needs.

What modules are made of stays, and looking through it again and again is a fifth of what a short
command takes, and of an agent's start. `begin` is called before anything is loaded, in processes
of ours alone, and `end` once all is: where nothing began it does nothing.
"""

from __future__ import annotations

import gc


def begin() -> None:
    """What is made from now on is taken to stay."""
    gc.disable()


def end() -> None:
    """All is loaded: the collector goes to work, and leaves alone what is there so far."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
