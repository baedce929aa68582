"""Shims: the small processes that hold what must outlive the daemon, one for each running container.

The daemon starts one nursery (see `launch.command`), which forks a shim for each container. A shim holds
the container's standard streams, its log file and its exit status. This package imports the standard
library only, and little of it: every module loaded here costs memory on each node.
"""
