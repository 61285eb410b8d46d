"""A run, a recommender and a service that the tests of serving share."""

from __future__ import annotations

import pytest
from serving_run import make_served_run, thinking

from gream_verl.core.run_folder import RunFolder
from gream_verl.serving.recommender import Recommender
from gream_verl.serving.service import Service


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return RunFolder.open(make_served_run(tmp_path_factory.mktemp("serving") / "run"))


@pytest.fixture(scope="session")
def recommender(run: RunFolder) -> Recommender:
    return Recommender(run)


@pytest.fixture
def service(run: RunFolder) -> Service:
    """A service that thinks, without vLLM; the application closes it."""
    return thinking(Service(run))
