"""Wrong configurations, files and flags: a table (`table.py`) and its test."""
