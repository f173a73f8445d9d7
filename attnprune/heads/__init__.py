"""Atlases: what every head of a model does over a text, counted over all of its edges, beside exact controls."""
