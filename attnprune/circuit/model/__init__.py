"""What a model computes as a graph: its parts, their activations, exact patching and gradients."""
