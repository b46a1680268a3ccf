"""What the CNI plugin asks of this agent."""
