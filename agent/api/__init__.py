"""What others call: vxmesh.v1.Control on the agent's unix socket."""
