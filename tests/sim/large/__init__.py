"""Many nodes on a virtual clock: `python -m tests.sim --nodes 1000 --loss 0.05 --seed 7 --kill`.

world.py carries messages as TCP would, host.py is a node and what it runs, membership.py runs
agent/core/membership.py on it, run.py is a whole run and what must hold in it. Hosts are slim and
nothing here is per message what it could be per run: 1,000 nodes for 10 virtual minutes are some
40 million events.

With `--endpoints N` a host runs the whole core: nodes.py has its records, links.py and peers.py
its streams, which follow from what its membership believes, load.py writes, and whole.py is the
run. docs/scale.md tells what came of it, and what of this is real.
"""
