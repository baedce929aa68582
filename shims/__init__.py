"""Shims: one small process for each container, which goes on when the daemon ends.

The daemon starts one nursery (`launch.command`), and the nursery forks a shim for each container. The shim has the
container's standard streams, its log file and its exit code. This package imports little, and only of the standard
library: each module costs memory in every shim.
"""
