"""The corpus of the field: what runs on other runtimes, case by case, with the upstream report."""
