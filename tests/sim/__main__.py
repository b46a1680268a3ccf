"""python -m tests.sim [--crashes | --bounded] --seeds N [--first SEED] | --seed SEED [--trace]."""

from __future__ import annotations

import argparse
import sys
import time

from tests.sim.crashrun import CrashRun
from tests.sim.scenario import Run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=1, help="the first of them")
    parser.add_argument("--seed", type=int, help="just this one, again")
    parser.add_argument("--crashes", action="store_true", help="with crashes and restarts")
    parser.add_argument("--trace", action="store_true", help="print every step")
    parser.add_argument("--bounded", action="store_true", help="streams to a few nodes only")
    options = parser.parse_args()
    seeds = (
        [options.seed]
        if options.seed is not None
        else range(options.first, options.first + options.seeds)
    )
    failed: list[int] = []
    done = refused = sent = 0
    begin = time.monotonic()
    for seed in seeds:
        try:
            log = print if options.trace else None
            run = CrashRun(seed, log) if options.crashes else Run(seed, log, options.bounded)
            run.play()
            done, refused = done + run.done, refused + run.refused
            sent += run.cluster.wire.sent
        except AssertionError as error:
            failed.append(seed)
            kind = "--crashes " * options.crashes + "--bounded " * options.bounded
            print(f"FAILED: {error}\n  replay: python -m tests.sim {kind}--seed {seed} --trace")
    took = time.monotonic() - begin
    print(
        f"{len(seeds)} seeds in {took:.1f} s: {len(failed)} failed; "
        f"{done} operations done, {refused} refused, {sent} messages"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
