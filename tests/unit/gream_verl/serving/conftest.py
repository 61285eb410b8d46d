"""A run and a recommender that the tests of serving share."""

from __future__ import annotations

import pytest
from serving_run import make_served_run

from gream_verl.core.run_folder import RunFolder
from gream_verl.serving.recommender import Recommender


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return RunFolder.open(make_served_run(tmp_path_factory.mktemp("serving") / "run"))


@pytest.fixture(scope="session")
def recommender(run: RunFolder) -> Recommender:
    return Recommender(run)
