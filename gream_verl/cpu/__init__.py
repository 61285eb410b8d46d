"""The parts that verl 0.9.1 and vLLM need on a machine without an accelerator; inert everywhere else.

One file per concern, with the file and line of verl or vLLM that it works around. None of it is specific to
recommendation: it is a candidate for upstreaming.
"""

from __future__ import annotations


def is_active() -> bool:
    """Return True when torch was built without any accelerator.

    The build decides, not the hardware: the head node of a GPU cluster may have no GPU and must be left alone.
    """
    import torch

    return torch.version.cuda is None and torch.version.hip is None and not hasattr(torch, "npu")


def activate() -> None:
    """Prepare this process, and those it starts, for training on a CPU; called at ``import verl`` in every process."""
    if not is_active():
        return
    from gream_verl.core import cpu_environment
    from gream_verl.cpu import fsdp, log_probs, platform, process_group, vllm_distribution

    cpu_environment.set_defaults()
    for part in (platform, process_group, fsdp, log_probs, vllm_distribution):
        part.register()
