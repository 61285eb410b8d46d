"""A pytest plugin (``-p second_runner``): vLLM's second model runner without a GPU.

Its kernels are in Triton, which has an interpreter for any machine. vLLM asks for a CPU backend, which Triton has not
in its releases: this names one.
"""

import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
