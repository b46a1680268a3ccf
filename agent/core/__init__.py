"""PURE state machines and functions: now and a Random are arguments, nothing touches the world."""
