"""What `import attnprune` changes in transformers, PEFT and bitsandbytes, without importing them before the user does.

transformers has no entry points, so the first call of `AutoConfig.from_pretrained`, which every auto class makes,
registers our model types. By then transformers is whole; during its own imports it is not. PEFT's `save_pretrained`
refuses a model with gates, since what it writes names the dense base. bitsandbytes does not see the package `kernels`,
with which it would fetch code from the Hub while it is imported, and compute other numbers.
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
    if "bitsandbytes" not in sys.modules:
        sys.meta_path.insert(0, _Hiding("bitsandbytes", "kernels"))
    for name, change in CHANGES.items():
        if name in sys.modules:
            change(sys.modules[name])
        else:
            sys.meta_path.insert(0, _AfterImport(name, change))


class _Around(MetaPathFinder):
    """Finds one module as Python would, and steps in where it is executed."""

    def __init__(self, name: str):
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        spec.loader.exec_module = functools.partial(self.executed, spec.loader.exec_module)
        return spec

    def executed(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        raise NotImplementedError


class _AfterImport(_Around):
    """Changes a module after it has been imported."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]):
        super().__init__(name)
        self.change = change

    def executed(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        execute(module)
        self.change(module)


class _Hiding(_Around):
    """Hides a package from a module that is being imported."""

    def __init__(self, name: str, hidden: str):
        super().__init__(name)
        self.hidden = hidden

    def executed(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        before = sys.modules.get(self.hidden)
        sys.modules[self.hidden] = None  # pyright: ignore[reportArgumentType]
        try:
            execute(module)
        finally:
            del sys.modules[self.hidden]
            if before is not None:
                sys.modules[self.hidden] = before


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
