"""Ray: started on this machine, or the running cluster that ``RAY_ADDRESS`` names."""

from __future__ import annotations

import os

from gream_verl.core.cpu_environment import set_defaults
from gream_verl.core.errors import InputError


def start_ray(most: int, option: str, *, may_grow: bool = False) -> str:
    """Start Ray or join the cluster, unless this process has done so; return what a process takes, ``GPU`` or ``CPU``.

    Raises:
        InputError: For more than there are, with the name of the option; not where the cluster ``may_grow``.
    """
    import ray
    import torch

    address = os.environ.get("RAY_ADDRESS", "")
    if not address or address.startswith("127.0.0.1"):
        set_defaults(only="RAY_" if torch.cuda.is_available() else "")  # Ray on loopback, with a GPU too
    if not ray.is_initialized():
        where = {} if address else {"address": "local", "num_cpus": max(most, os.cpu_count() or 1)}
        ray.init(**where, include_dashboard=False, log_to_driver=False, logging_level="warning")
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU") else "CPU"
    if most > resources.get(kind, 0) and not (address and may_grow):
        raise InputError(f"{option}: {most}: Ray has {resources.get(kind, 0):.0f} {kind}s; ask for fewer")
    return kind
