"""Traces: the smallest set of attention messages that keeps one prediction, decided by closing all others."""
