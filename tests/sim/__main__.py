"""Clusters on a virtual clock.

A small one under a load of creates and removes:
    [--crashes | --bounded] --seeds N [--first SEED] | --seed SEED [--trace]
Many nodes, to see how it scales:
    --nodes N [--endpoints N] [--loss P] [--slow P] [--kill] [--minutes M] …
Clusters of 10 to 1,000 nodes, drawn:
    --plot FILE
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from agent.core.membership import PRESETS
from tests.sim import plot
from tests.sim.crashrun import CrashRun
from tests.sim.large import run as large
from tests.sim.large.run import Options
from tests.sim.large.whole import WholeRun
from tests.sim.scenario import Run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=1, help="the first of them")
    parser.add_argument("--seed", type=int, help="just this one, again")
    parser.add_argument("--crashes", action="store_true", help="with crashes and restarts")
    parser.add_argument("--trace", action="store_true", help="print every step")
    parser.add_argument("--bounded", action="store_true", help="streams to a few nodes only")
    many = parser.add_argument_group("many nodes")
    many.add_argument("--nodes", type=int, help="how many")
    many.add_argument(
        "--endpoints", type=int, default=0, help="of each; then the whole core runs, not just SWIM"
    )
    many.add_argument("--writes", type=int, default=60, help="new endpoints in the course of it")
    many.add_argument("--loss", type=float, default=0.0, help="share of packets lost, 0..1")
    many.add_argument("--slow", type=float, default=0.0, help="share of nodes that are slow")
    many.add_argument(
        "--noise", type=float, default=0.0, help="everything is late by up to so many s"
    )
    many.add_argument("--minutes", type=float, default=0.5, help="how long, in virtual time")
    many.add_argument("--kill", action="store_true", help="one host falls silent")
    many.add_argument("--refuse", action="store_true", help="one agent dies, its host answers")
    many.add_argument("--split", type=float, default=0.0, help="cut in two halves for so many s")
    many.add_argument("--plot", type=Path, help="draw convergence against the size, as SVG")
    many.add_argument("--preset", choices=PRESETS, default="lan")
    options = parser.parse_args()
    if options.plot is not None:
        seed = options.seed if options.seed is not None else 7
        plot.main(
            options.plot,
            Options(
                nodes=0,
                seed=seed,
                loss=options.loss or 0.05,
                endpoints=options.endpoints or 10,
                writes=options.writes,
            ),
        )
        return 0
    if options.nodes is not None:
        if options.nodes < 2:
            parser.error("--nodes: at least 2")
        return _many(options)
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


def _many(options: argparse.Namespace) -> int:
    kind = WholeRun if options.endpoints else large.Run
    run = kind(
        Options(
            nodes=options.nodes,
            seed=options.seed if options.seed is not None else 1,
            loss=options.loss,
            slow=options.slow,
            noise=options.noise,
            minutes=options.minutes,
            kill=options.kill,
            refuse=options.refuse,
            split=options.split,
            preset=options.preset,
            endpoints=options.endpoints,
            writes=options.writes,
        )
    )
    try:
        run.play()
    except AssertionError as error:
        print(f"FAILED: {error}")
        return 1
    finally:
        print(run.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
