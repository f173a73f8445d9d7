"""The Python API: what the commands do, as functions with the same words, for a script or a notebook."""
