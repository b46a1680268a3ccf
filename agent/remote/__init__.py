"""Third parties' network and IPAM plugins, over the protocol that Docker's plugins speak."""
