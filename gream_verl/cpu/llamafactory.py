"""LLaMA-Factory's command line with a Muon that suits CPUs: ``python -m gream_verl.cpu.llamafactory train CONFIG``.

LLaMA-Factory's Muon makes its updates orthogonal in bfloat16 (llamafactory/third_party/muon/muon.py:55). Most CPUs have
no instructions for it, and torch then multiplies matrices fifteen times as slowly as in float32: more than half of the
time of the tiny model's SFT. Everything else is ``llamafactory-cli``.
"""

from __future__ import annotations

from torch import Tensor

from gream_verl.cpu import is_active


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
    from llamafactory.cli import main as llamafactory_cli
    from llamafactory.third_party.muon import muon

    if is_active():
        muon.zeropower_via_newtonschulz5 = orthogonalised
    llamafactory_cli()


if __name__ == "__main__":
    main()
