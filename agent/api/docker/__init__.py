"""Docker's network plugin: how an engine on this host makes networks and endpoints of ours."""
