"""Doing something right after a module is imported, so that a process pays only for the modules it uses anyway."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Action = Callable[[ModuleType], None]


class _Hooks(MetaPathFinder):
    """Finds nothing itself; asks the other finders and runs the actions after the module was executed."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.actions:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.actions[fullname])
        return spec


class _Loader(Loader):
    """The module's own loader, and then the actions."""

    def __init__(self, loader: Loader, actions: Sequence[Action]) -> None:
        self.loader = loader
        self.actions = actions

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader  # what inspect and pickle expect to see
        self.loader.exec_module(module)
        for action in self.actions:
            action(module)


_hooks = _Hooks()


def when_imported(name: str, action: Action) -> None:
    """Call ``action(module)`` once module ``name`` has been imported: now, if it already is.

    An error in ``action`` makes the import fail, so it cannot go unnoticed.

    Args:
        name: Full dotted name of the module.
        action: What to do with the module.
    """
    if name in sys.modules:
        action(sys.modules[name])
        return
    if _hooks not in sys.meta_path:
        sys.meta_path.insert(0, _hooks)
    _hooks.actions.setdefault(name, []).append(action)
