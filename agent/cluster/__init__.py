"""The only room that talks to other agents: gRPC streams, finding peers, asking for addresses."""
