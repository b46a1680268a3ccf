"""`python -m agent.resolver`: see process.py, which is loaded while the collector rests."""

import sys

from agent import loading

loading.begin()

from agent.resolver.process import main  # noqa: E402

loading.end()

if __name__ == "__main__":
    sys.exit(main())
