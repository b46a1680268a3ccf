import logging
import sys

import structlog

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
logging.disable(logging.CRITICAL)
import importlib
import traceback

from tests.fuzz import engine

mod = importlib.import_module("tests.fuzz.targets." + sys.argv[1])
n = int(sys.argv[2])
seed = int(sys.argv[3]) if len(sys.argv) > 3 else 1
only = sys.argv[4] if len(sys.argv) > 4 else ""
for t in mod.TARGETS:
    if only and only != t.name:
        continue
    r = engine.run(t, n, seed)
    print(
        f"{t.name:24} {r.inputs:7} {r.rate:8.0f}/s refused {r.refused} slowest {r.slowest * 1000:.1f} ms growth {r.growth >> 10} kB"
    )
    for f in r.failures:
        e = f.__cause__
        print("  FAILED", str(f)[:600])
        if e:
            print("".join(traceback.format_tb(e.__traceback__)[-4:]))
