"""Found by pytest before any test; its folder goes on sys.path, so that tests can import ``assets``."""

from __future__ import annotations

import os

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ENGINES, SFT = "engines", "sft"
SFT_FILES = ("test_sft", "test_lora", "test_smollm2", "test_extras", "test_embed_processes", "test_cpu_platform",
             "test_gpu_check", "test_serve", "test_page")  # fmt: skip
"""Beginnings of the names of files that leave room for the others."""

# Two cores shared with others: a slow example is no failure. The same examples every time: CI does not roll dice.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("project")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests that run frameworks in two workers, one after the other in each: they take gigabytes."""
    for item in items:
        if item.get_closest_marker("integration"):
            item.add_marker(pytest.mark.xdist_group(SFT if item.path.name.startswith(SFT_FILES) else ENGINES))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Refuse to run two frameworks at once: some releases of pytest-xdist and pytest do not group together."""
    if item.get_closest_marker("integration") and "PYTEST_XDIST_WORKER" in os.environ:
        grouped = item.nodeid.endswith((f"@{ENGINES}", f"@{SFT}"))
        assert grouped, "run several workers with --dist loadgroup, as `make test` does"
