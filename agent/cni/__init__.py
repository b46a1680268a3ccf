"""vxmesh-cni: the CNI plugin that runtimes start. The standard library only, and little of it."""
