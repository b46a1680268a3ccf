"""The same targets under atheris (libFuzzer), which keeps the inputs that reach new code.

Mutations are half libFuzzer's own and half those of inputs.py, on a corpus that begins with what
was kept and with what the target makes itself. What stands opposite: engine.py, whose meter is
used here as well, so that time and memory are watched in the same way.
"""

from __future__ import annotations

import atexit
import os
import random
import sys
from pathlib import Path

import atheris  # type: ignore[import-untyped]

from tests.fuzz.engine import Failed, Meter, scratch

SEEDS = 200  # made inputs that the corpus begins with
BYTES_MAX = 1 << 14


def run_guided(name: str, count: int, seed: int, artifacts: str) -> int:
    """Run `count` inputs of a target; the process ends in here, with a report on stdout."""
    with atheris.instrument_imports(include=["agent"]):
        from tests.fuzz.targets import TARGETS
    from tests.fuzz.__main__ import tell

    target = TARGETS[name]
    rng = random.Random(f"{name} {seed} guided")
    held = scratch()
    corpus = Path(held.name)
    made = [path.read_bytes() for path in target.corpus()]
    made += [target.make(rng) for _ in range(SEEDS)]
    for number, data in enumerate(made):
        (corpus / f"{number:04}").write_bytes(data)
    meter = Meter(target, count)

    def end() -> None:
        report = meter.close()
        report.target = name
        tell(report, artifacts)
        sys.stdout.flush()
        held.cleanup()
        atexit._run_exitfuncs()  # directories of the targets
        os._exit(0)  # libFuzzer would go on

    def test(data: bytes) -> None:
        try:
            meter.take(data)
        except Failed as failure:
            meter.report.failures.append(failure)
            end()
        if meter.report.inputs >= count:
            end()

    def mutator(data: bytes, most: int, chosen: int) -> bytes:
        own = random.Random(chosen)
        if chosen % 2:
            return bytes(atheris.Mutate(data, most))
        if chosen % 16 == 0:
            return target.make(own)[:most]
        from tests.fuzz.inputs import mutate

        return mutate(data, own, made, target.tokens)[:most]

    options = [sys.argv[0], f"-seed={seed % (1 << 31) or 1}", f"-max_len={BYTES_MAX}"]
    options += ["-rss_limit_mb=4096", "-timeout=60", "-verbosity=0", "-len_control=0"]
    options.append(f"-artifact_prefix={corpus}/")
    atheris.Setup([*options, str(corpus)], test, custom_mutator=mutator)
    atheris.Fuzz()
    return 1  # it does not come back
