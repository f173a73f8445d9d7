"""Gated attention: the fp64 reference, the chunked implementation and the transformers interface."""
