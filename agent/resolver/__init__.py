"""The name server of a host's sandboxes: a process of its own, fed by the agent.

`python -m agent.resolver` outlives the agent, so names resolve while it restarts, and a flood
of questions cannot starve the failure detector. feed.py is the protocol between the two,
client.py the agent's half, intake.py the resolver's; server.py listens to the sandboxes,
messages.py reads and writes DNS, forward.py asks the host's resolvers for what is not ours.
"""
