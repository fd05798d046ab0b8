"""The small transformer: causal, tied on request, and its loss."""

from __future__ import annotations

import pytest
import torch

from cograd.models import GPT
from cograd.models.gpt import next_token_loss


def model(tied: bool = False) -> GPT:
    torch.manual_seed(0)
    return GPT(11, width=16, blocks=2, heads=2, context=8, tied=tied)


def test_a_token_sees_only_what_came_before() -> None:
    tokens = torch.arange(8).unsqueeze(0)
    changed = tokens.clone()
    changed[0, 5] = 0
    with torch.no_grad():
        difference = (model()(tokens) - model()(changed)).abs().amax(-1)[0]
    assert bool((difference[:5] < 1e-6).all())
    assert bool((difference[5:] > 1e-6).all())


def test_parameters_are_counted_as_stated() -> None:
    big = GPT(65, width=256, blocks=6, heads=4, context=128)
    assert sum(p.numel() for p in big.parameters()) == pytest.approx(4.8e6, rel=0.01)
    one = model(tied=True)
    assert one.head.weight is one.tokens.weight
    assert sum(p.numel() for p in model().parameters()) - sum(p.numel() for p in one.parameters()) == 11 * 16


def test_the_loss_is_cross_entropy_and_a_z_term() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(3, 5, 7, generator=draw), torch.randint(7, (3, 5), generator=draw)
    plain = torch.nn.functional.cross_entropy(logits.view(-1, 7), targets.view(-1))
    torch.testing.assert_close(next_token_loss(logits, targets, 0), plain)
    z = torch.logsumexp(logits, -1).square().mean()
    torch.testing.assert_close(next_token_loss(logits, targets), plain + 1e-4 * z)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(
        ValueError, match="width a multiple of heads; got vocabulary=11, width=10, blocks=2, heads=4"
    ):
        GPT(11, width=10, blocks=2, heads=4)
