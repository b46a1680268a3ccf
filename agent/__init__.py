"""vxmesh: one agent a host, isolated networks across them (see docs/architecture.md)."""

__version__ = "0.1.0"
