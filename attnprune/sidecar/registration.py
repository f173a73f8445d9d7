"""What `import attnprune` changes in transformers and PEFT, without importing them before the user does.

transformers has no entry points, so the first call of `AutoConfig.from_pretrained`, which every auto class makes,
registers our model types. By then transformers is whole; during its own imports it is not. PEFT's `save_pretrained`
refuses a model with gates, since what it writes names the dense base.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def register() -> None:
    """Arrange each change now, or when its module is imported."""
    for name, change in CHANGES.items():
        if name in sys.modules:
            change(sys.modules[name])
        else:
            sys.meta_path.insert(0, _AfterImport(name, change))


class _AfterImport(MetaPathFinder):
    """Finds one module as Python would, and steps in after it has been executed."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]):
        self.name, self.change = name, change

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_change(module: ModuleType) -> None:
            execute(module)
            self.change(module)

        spec.loader.exec_module = execute_then_change
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


def _refuse_to_save_gates(module: ModuleType) -> None:
    from attnprune.attention.interface import SAVING

    for name in SAVING:
        setattr(module.PeftModel, name, _unless_gated(getattr(module.PeftModel, name)))


def _unless_gated(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        from attnprune.attention.interface import gates_of, refuse_to_save

        return (refuse_to_save if gates_of(self) else save)(self, *args, **kwargs)

    return checked


CHANGES = {
    "transformers.models.auto.configuration_auto": _register_on_first_use,
    "peft.peft_model": _refuse_to_save_gates,
}
