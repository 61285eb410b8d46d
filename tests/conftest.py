"""Found by pytest before any test; its folder goes on sys.path, so that tests can import ``assets``."""

from __future__ import annotations

import os

import hypothesis

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Two cores shared with others: a slow example is no failure. The same examples every time: CI does not roll dice.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True)
hypothesis.settings.load_profile("project")
