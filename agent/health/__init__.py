"""Health checks: each node looks at its own backends, from inside their sandboxes.

checker.py says when to look at what, and tells the node what changed; probes.py looks.
What stands opposite: agent/node/services.py writes what was found, core/checking.py judges it.
"""

from agent.health.checker import HealthChecker

__all__ = ["HealthChecker"]
