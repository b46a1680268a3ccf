"""The vxmesh command, also as python -m agent …"""

from __future__ import annotations

from typing import NoReturn

from agent import loading


def main() -> NoReturn:
    """Run the process's own command line and end it."""
    loading.begin()
    from agent.cli import main as command  # only now: click is a third of all

    command.main()


if __name__ == "__main__":
    main()
