"""The smallest circuit of a model for a task: rankings, sizes, masks and deletion, on splits of the prompts."""
