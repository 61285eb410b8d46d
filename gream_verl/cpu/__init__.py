"""What verl 0.9.1 and vLLM need to run on a machine without an accelerator; inert everywhere else.

One file per concern; each says which file and line of verl or vLLM it works around. None of it is specific to
recommendation: it is a candidate for upstreaming.
"""

from __future__ import annotations

HF_ROLLOUT = "hf_cpu"
"""Name of the Hugging Face rollout (``actor_rollout_ref.rollout.name``)."""


def is_active() -> bool:
    """Return whether torch was built without any accelerator.

    The build decides, not the hardware: the head node of a GPU cluster may have no GPU and must be left alone.
    """
    import torch

    return torch.version.cuda is None and torch.version.hip is None and not hasattr(torch, "npu")


def activate() -> None:
    """Prepare this process, and those it starts, for training on a CPU; does nothing with an accelerator.

    Called by the verl plugin at ``import verl``, in every process.
    """
    if not is_active():
        return
    from gream_verl.cpu import (
        environment,
        fsdp,
        hf_rollout_registration,
        log_probs,
        platform,
        process_group,
        vllm_distribution,
    )

    environment.set_defaults()
    platform.register()
    process_group.register()
    fsdp.register()
    log_probs.register()
    vllm_distribution.register()
    hf_rollout_registration.register()
