"""A node on which the project is installed as its users do it. The tests change the machine: make test-vm has one."""
