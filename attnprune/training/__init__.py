"""From a base model to a sidecar: constraint, trainer, checkpoints, and the recipe that holds them together."""
