"""OCI: the runtime spec of a container, with its devices, its seccomp filter and its user. Pure functions."""
