"""criserver: a container runtime daemon for Kubernetes nodes."""

__version__ = "0.1.0"
