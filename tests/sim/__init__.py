"""A cluster of real nodes, sessions and rings on a virtual clock and a hostile network.

One seed decides everything; the same seed replays the same run, event by event.
`python -m tests.sim --seeds 1000` runs many, `--seed N --trace` shows one.
"""
