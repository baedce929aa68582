"""The daemon's own metrics: the table of families, their instruments, and the endpoint that serves them.

A room imports :mod:`criserver.telemetry.families` and counts. That costs nothing until metrics are on.
"""
