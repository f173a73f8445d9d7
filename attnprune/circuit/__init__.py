"""Circuits: which heads, MLPs and edges of a model carry a behaviour, measured by exact patching.

`attnprune.circuit("demo", "addition")` searches one: see `attnprune.api.commands.circuit`.
"""

from attnprune.late import callable_package

callable_package(__name__)
