"""Triton kernels of gated attention: training (forward and backward) and run time (prefill and decode).

Nothing outside this package imports triton, and nothing imports this package on a machine without it.
"""
