"""criserver: a container runtime daemon for Kubernetes nodes.

The version stands here alone. pyproject.toml, the Debian package and the command read it.
"""

__version__ = "0.2.0"
