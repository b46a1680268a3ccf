"""The one owner of this node's state: every change is one synchronous method, so no locks.

records.py writes this node's own records and tells listeners of changes; networks.py,
endpoints.py and state.py stand on it, each with the methods of its concept. What stands
opposite: api/ calls the methods, agent/allocator.py waits for donated addresses.
"""

from agent.node.endpoints import NeedSpace
from agent.node.records import JOIN_ANEW, expelled_error
from agent.node.state import NodeState

__all__ = ["JOIN_ANEW", "NeedSpace", "NodeState", "expelled_error"]
