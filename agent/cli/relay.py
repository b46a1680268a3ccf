"""Signals to a command that runs for us, and how it ended: it goes by what reaches us.

What a terminal sends, by ^C, ^\\ or when it hangs up, goes to all of its foreground group, so the
command has it already; what a process sends to us is passed on. Only the siginfo tells the two
apart (sigaction(2)), and Python's handlers do not get it: so signals are held back and waited for,
as `sudo` looks at who sent them. It does not tell that a process sent one to all of our group, or
to each process of a service: then the command has it twice.

Only this thread holds signals back. With an agent by TCP gRPC's threads are there too, and what
comes while this one does not wait for it is theirs: SIGINT is lost then, others end us alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection

RELAYED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
SI_KERNEL = 0x80  # include/uapi/asm-generic/siginfo.h: no process sent it


def hold() -> set[signal.Signals]:
    """From now on signals wait for `reap`; which of them did not before, for `release`."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who ignores it is not told of ends
    wanted = {*RELAYED, signal.SIGCHLD}
    return wanted - signal.pthread_sigmask(signal.SIG_BLOCK, wanted)


def fork() -> int:
    """os.fork, since `hold`. What has come meanwhile waits for the child as well: it would not have
    that otherwise, and what a terminal sent is passed on to nobody later."""
    came = []
    while info := signal.sigtimedwait(RELAYED, 0):
        came.append(info.si_signo)
    child = os.fork()
    if child == 0:
        for number in came:
            os.kill(os.getpid(), number)
    return child


def release(held: Collection[int]) -> None:
    """In a child that is to become a command: signals end it as they end any. `held` is what it
    has of a `hold` before it was forked."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, held)


def reap(pid: int) -> int:
    """Pass signals on to a child until it has ended, since `hold`; its exit status, 128 + n if
    signal n ended it."""
    try:
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            info = signal.sigwaitinfo({*RELAYED, signal.SIGCHLD})
            if info.si_signo != signal.SIGCHLD and not _has_it(pid, info):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, info.si_signo)
    except ChildProcessError:
        return 1
    code = os.waitstatus_to_exitcode(ended[1])
    return code if code >= 0 else 128 - code


def _has_it(pid: int, info: signal.struct_siginfo) -> bool:
    """Whether what reached us reached the child as well: the kernel sent it to our group."""
    if info.si_code != SI_KERNEL:
        return False
    if info.si_signo == signal.SIGHUP and os.getsid(0) == os.getpid():
        return False  # a hang-up is told to the session's leader first
    return os.getpgid(pid) == os.getpgrp()
