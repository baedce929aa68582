"""What is measured, by group of rows."""
