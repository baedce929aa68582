"""Sandboxes and containers: their records, their state machines, one module for each operation on them."""
