"""Actions right after the import of a module, so that a process pays only for the modules that it uses anyway."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Action = Callable[[ModuleType], object]


class _Hooks(MetaPathFinder):
    """Finder that asks the other finders, and lets the loader run the actions after the module."""

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
            execute = spec.loader.exec_module

            def execute_with_actions(module: ModuleType) -> None:
                execute(module)
                for action in self.actions[fullname]:
                    action(module)

            # On this loader only; it stays what inspect and pickle expect to see.
            spec.loader.exec_module = execute_with_actions  # type: ignore[method-assign]
        return spec


_hooks = _Hooks()


def when_imported(name: str, action: Action) -> None:
    """Call ``action(module)`` right after the import of module ``name``: now, if it is imported already.

    An error in ``action`` makes the import fail, so that it cannot go unnoticed.
    """
    if name in sys.modules:
        action(sys.modules[name])
        return
    if _hooks not in sys.meta_path:
        sys.meta_path.insert(0, _hooks)
    _hooks.actions.setdefault(name, []).append(action)
