"""Lets hydra find gream-verl's recipes: ``python -m verl.trainer.main_ppo +recipe=gream_srpo``."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class GreamSearchPath(SearchPathPlugin):
    """Appends the installed recipes to hydra's search path, after verl's own configuration."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the recipes."""
        search_path.append(provider="gream-verl", path="pkg://gream_verl.recipes")
