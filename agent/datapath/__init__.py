"""The only room that changes the kernel: from the desired state of drivers/ to what is so."""
