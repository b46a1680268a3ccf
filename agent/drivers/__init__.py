"""PURE: what turns networks and endpoints into the kernel state that this node should hold."""
