"""A node with the installed package. The tests change the machine: they run in the machine of make test-vm."""
