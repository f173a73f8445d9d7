"""Benchmarks for users: several implementations side by side in one process, checked before they are timed."""
