"""LLaMA-Factory's command line with a Muon that suits CPUs: ``python -m gream_verl.cpu.llamafactory train CONFIG``.

LLaMA-Factory's Muon makes its updates orthogonal in bfloat16 (llamafactory/third_party/muon/muon.py:55). Most CPUs have
no instructions for it, and torch then multiplies matrices fifteen times as slowly as in float32: more than half of the
time of the tiny model's SFT. Everything else is ``llamafactory-cli``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gream_verl.cpu import is_active

if TYPE_CHECKING:
    from torch import Tensor


def orthogonalised(update: Tensor, steps: int) -> Tensor:
    """Return ``update`` [rows, columns] with all singular values near 1, by ``steps`` of Newton and Schulz.

    The coefficients are those of https://kellerjordan.github.io/posts/muon, and of LLaMA-Factory.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = update if update.shape[0] <= update.shape[1] else update.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide is update else x.T


def main() -> None:
    """Run ``llamafactory-cli`` with the arguments of this process."""
    # Turns that a thread waits for the others before it sleeps, read when torch is loaded. libgomp's 300,000 make a
    # step 6% faster on two free cores, but 1.5 times as slow next to a program that keeps one of them busy.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from llamafactory.cli import main as llamafactory_cli
    from llamafactory.third_party.muon import muon

    if is_active():
        muon.zeropower_via_newtonschulz5 = orthogonalised
    llamafactory_cli()


if __name__ == "__main__":
    main()
