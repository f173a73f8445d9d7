"""Circuits: which heads, MLPs and edges of a model carry a behaviour, measured by exact patching."""
