"""The long form: a million inputs over all targets, each in a process of its own, two at a time.

    python -m tests.fuzz [--inputs N] [--only TARGET]… [--seed N] [--guided auto|yes|no] [--jobs N]
    python -m tests.fuzz --only TARGET --replay FILE…       run kept inputs, with what they raise

Half of a target's inputs are made by inputs.py from the seed that is printed; the other half,
where atheris is installed, by libFuzzer, which keeps what reaches new code. Ends with status 1 if
an input raised what it may not, was slow, or memory grew; the input is kept in --artifacts.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import json
import random
import subprocess
import sys
import time
import traceback
from pathlib import Path

from tests.fuzz.engine import GROWTH_MAX, Failed, Report, attempt, run
from tests.fuzz.quiet import quiet

INPUTS = 1_000_000


def child(arguments: argparse.Namespace) -> int:
    """Run one target in this process; a line of JSON on stdout at its end."""
    quiet().__enter__()
    if arguments.guided == "yes":
        from tests.fuzz.guided import run_guided

        return run_guided(arguments.child, arguments.inputs, arguments.seed, arguments.artifacts)
    from tests.fuzz.targets import TARGETS

    target = TARGETS[arguments.child]

    def told(done: int) -> None:
        print(json.dumps({"done": done}), flush=True)

    tell(run(target, arguments.inputs, arguments.seed, told=told), arguments.artifacts)
    return 0


def tell(report: Report, artifacts: str) -> None:
    """Write a report for the parent, and what failed into files."""
    failures = [keep(failed, report.target, artifacts) for failed in report.failures]
    found = dataclasses.asdict(dataclasses.replace(report, failures=[], slowest_input=b""))
    found["failures"] = failures
    print(json.dumps({"report": found}), flush=True)


def keep(failed: Failed, target: str, artifacts: str) -> str:
    """Write an input that failed; what to say of it."""
    directory = Path(artifacts)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{target}-{hashlib.sha256(failed.data).hexdigest()[:12]}"
    path.write_bytes(failed.data)
    trace = "".join(traceback.format_exception(failed.__cause__)[-4:]) if failed.__cause__ else ""
    return f"{str(failed)[:600]}\nkept in {path}\n{trace}"


def replay(arguments: argparse.Namespace) -> int:
    """Run inputs from files."""
    from tests.fuzz.targets import TARGETS

    (name,) = arguments.only
    for file in arguments.replay:
        data = Path(file).read_bytes()
        try:
            refused, seconds = attempt(TARGETS[name], data)
        except Failed as failed:
            raise failed.__cause__ or failed from None
        print(f"{file}: {'refused' if refused else 'taken'} in {seconds * 1000:.1f} ms")
    return 0


class Progress:
    """One line on a terminal, nothing in a pipe."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, {"": 0}
        self._began = time.monotonic()

    def note(self, job: str, done: int) -> None:
        """A job has done that many inputs."""
        self._done[job] = done
        if sys.stderr.isatty():
            all_done, seconds = sum(self._done.values()), time.monotonic() - self._began
            share = all_done / self._total
            print(f"\r{all_done:>9,} of {self._total:,} inputs ({share:.0%}), {seconds:.0f} s, "
                  f"{job}\x1b[K", end="", file=sys.stderr)  # fmt: skip

    def clear(self) -> None:
        """Make room for a line of the table."""
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr)


def run_job(
    name: str, guided: bool, count: int, arguments: argparse.Namespace, progress: Progress
) -> Report:
    """One child, from its start to its report."""
    job = f"{name}{' (guided)' if guided else ''}"
    command = [sys.executable, "-m", "tests.fuzz", "--child", name, "--inputs", str(count)]
    command += ["--seed", str(arguments.seed), "--artifacts", arguments.artifacts]
    command += ["--guided", "yes" if guided else "no"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    report: Report | None = None
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        errors = pool.submit(process.stderr.read)  # type: ignore[union-attr]
        for line in process.stdout or ():
            if not line.startswith("{"):
                continue
            found = json.loads(line)
            if "done" in found:
                progress.note(job, found["done"])
            else:
                failures = found["report"].pop("failures")
                report = Report(**{**found["report"], "target": job, "slowest_input": b""})
                report.failures = [Failed(name, text, b"") for text in failures]
                progress.note(job, report.inputs)
        said = errors.result()
    if (process.wait() and report is None) or report is None:
        report = Report(job, failures=[Failed(name, f"the child ended: {said[-2000:]}", b"")])
    return report


def main() -> int:
    """Run what the command line asks for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--inputs", type=int, default=INPUTS)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--guided", choices=("auto", "yes", "no"), default="auto")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--artifacts", default="fuzz-found")
    parser.add_argument("--replay", nargs="+")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments)
    if arguments.replay:
        return replay(arguments)
    from tests.fuzz.targets import TARGETS

    chosen = [t for t in TARGETS.values() if not arguments.only or t.name in arguments.only]
    there = importlib.util.find_spec("atheris") is not None
    both = there if arguments.guided == "auto" else arguments.guided == "yes"
    weights = sum(target.weight for target in chosen)
    jobs = [
        (target.name, guided, int(arguments.inputs * target.weight / weights / (1 + both)) + 1)
        for target in chosen
        for guided in ((False, True) if both else (False,))
    ]
    total = sum(count for _, _, count in jobs)
    print(f"{total:,} inputs, {len(chosen)} targets, seed {arguments.seed}"
          f"{'' if both else ', not guided by coverage: atheris is not installed'}")  # fmt: skip
    head = ("target", "inputs", "a second", "refused", "slowest", "growth")
    print("{:34} {:>8} {:>8} {:>8} {:>10} {:>9}".format(*head))
    progress, failed, done, began = Progress(total), [], 0, time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        futures = [pool.submit(run_job, *job, arguments, progress) for job in jobs]
        for future in futures:
            report = future.result()
            done += report.inputs
            progress.clear()
            print(f"{report.target:34} {report.inputs:8,} {report.rate:8,.0f} "
                  f"{report.refused / max(report.inputs, 1):8.0%} {report.slowest * 1e3:7.1f} ms "
                  f"{report.growth / 2**20:6.1f} MB", flush=True)  # fmt: skip
            if report.growth > GROWTH_MAX:
                grown = f"memory grew by {report.growth >> 20} MB"
                report.failures.append(Failed(report.target, grown, b""))
            failed += report.failures
    seconds = time.monotonic() - began
    print(f"{done:,} inputs in {seconds:.0f} s: {len(failed)} failures")
    for failure in failed:
        print(f"\n{failure}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
