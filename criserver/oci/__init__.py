"""OCI: the runtime spec built from what was asked, and who a container runs as. Pure functions."""
