"""python -m agent …: the same as the vxmesh command."""

from agent.cli.main import main

main()
