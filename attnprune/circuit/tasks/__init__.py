"""Prompt pairs for finding circuits: generated tasks and the user's own file, with their metrics."""

from attnprune.circuit.tasks.build import load_task, task_names
from attnprune.circuit.tasks.nonsense import nonsense_task
from attnprune.circuit.tasks.prompts import Ability, Prompts, Task, accuracy, check_ability

__all__ = ["Ability", "Prompts", "Task", "accuracy", "check_ability", "load_task", "nonsense_task", "task_names"]
