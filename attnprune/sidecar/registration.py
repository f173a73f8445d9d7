"""Merged models in transformers' auto classes after `import attnprune`, without importing transformers before the user.

transformers has no entry points, so the first call of `AutoConfig.from_pretrained`, which every auto class makes,
registers our model types. By then transformers is whole; during its own imports it is not.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Arrange the registration now, or when transformers' AutoConfig is imported."""
    if AUTO_CONFIG in sys.modules:
        _register_on_first_use(sys.modules[AUTO_CONFIG])
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Finds one module as Python would, and steps in after it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_arrange(module: ModuleType) -> None:
            execute(module)
            _register_on_first_use(module)

        spec.loader.exec_module = execute_then_arrange
        return spec


def _register_on_first_use(module: ModuleType) -> None:
    auto = module.AutoConfig
    original = auto.__dict__["from_pretrained"]

    @functools.wraps(original.__func__)
    def from_pretrained(cls: type, *args: object, **kwargs: object) -> object:
        auto.from_pretrained = original
        from attnprune.sidecar import modeling_attnprune

        modeling_attnprune.register()
        return auto.from_pretrained(*args, **kwargs)

    auto.from_pretrained = classmethod(from_pretrained)
