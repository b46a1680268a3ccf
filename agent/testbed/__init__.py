"""Hosts made of network namespaces on one machine, each with an agent: see bed.py."""

from agent.testbed.bed import Testbed, take_down, temporary
from agent.testbed.host import Host

__all__ = ["Host", "Testbed", "take_down", "temporary"]
