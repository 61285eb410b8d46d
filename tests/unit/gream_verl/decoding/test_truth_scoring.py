from __future__ import annotations

import numpy as np
import torch

from gream_verl.decoding.truth_scoring import decompress, force


def test_a_forced_token_is_the_most_probable_one_and_tells_its_probability():
    torch.manual_seed(0)
    logits = torch.randn(200, 50) * 6
    tokens, temperatures = torch.randint(50, (200,)), torch.rand(200) + 0.2
    logits[:, 7] = -torch.inf  # forbidden
    tokens[tokens == 7] = 8
    kept = logits.clone()
    forced = force(logits, tokens, temperatures)
    assert torch.equal(logits, kept)
    assert torch.equal(forced.argmax(dim=-1), tokens)
    log_probs = forced.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
    expected = (logits / temperatures[:, None]).softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
    np.testing.assert_allclose(decompress(log_probs.tolist()), expected, rtol=1e-4, atol=1e-15)
