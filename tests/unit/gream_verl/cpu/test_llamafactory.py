"""The orthogonal updates of Muon in 32 bits, and the threads of the process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from gream_verl.cpu.llamafactory import orthogonalised


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8)])
def test_an_update_keeps_its_singular_vectors_and_gets_singular_values_near_one(shape):
    u, s, v = torch.linalg.svd(torch.randn(shape, generator=torch.manual_seed(0)), full_matrices=False)
    found = u.T @ orthogonalised(u * s @ v, 5) @ v.T
    assert (found.diagonal() > 0.6).all()
    assert (found.diagonal() < 1.3).all()
    torch.testing.assert_close(
        found - torch.diag(found.diagonal()),
        torch.zeros(8, 8) if 8 in shape else torch.zeros(16, 16),
        atol=1e-4,
        rtol=0,
    )


def test_it_is_the_update_of_llama_factory_without_its_rounding():
    muon = pytest.importorskip("llamafactory.third_party.muon.muon")
    update = torch.randn(24, 40, generator=torch.manual_seed(0))
    theirs = muon.zeropower_via_newtonschulz5(update, 5).float()
    torch.testing.assert_close(orthogonalised(update, 5), theirs, atol=0.05, rtol=0)


def test_it_says_how_long_threads_wait_before_torch_is_loaded():
    code = "import sys, gream_verl.cpu.llamafactory; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
