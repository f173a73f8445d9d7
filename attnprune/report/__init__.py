"""Turning results into what a person reads: rich tables and grids for the terminal, dictionaries for JSON."""
