"""Text as blocks of tokens: sources, packing, splits, and text that a model writes itself."""
