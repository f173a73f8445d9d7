"""Pushing to the Hub: a plan, the planned files, the model card."""
