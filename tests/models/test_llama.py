"""The Llama-style model: what it computes, and its end as a model of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cograd.models.llama import Llama, LlamaConfig, LlamaEnd, LoRA, add_lora, rotate, rotations, through

CONFIG = LlamaConfig(vocabulary=50, width=24, blocks=4, heads=6, kv_heads=2, hidden=40, rope_base=1000.0)


def model(config: LlamaConfig = CONFIG) -> Llama:
    torch.manual_seed(0)
    return Llama(config).requires_grad_(False)


def tokens(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("first", [0, 2, 3, 4])
def test_the_end_after_the_prefix_is_the_whole_model_to_the_bit(first: int) -> None:
    whole, ids, words = model(), tokens(), torch.tensor([7, 3])
    end, kept = LlamaEnd(whole, first, words), whole.prefix(ids, first)
    assert torch.equal(through(end.blocks, kept, CONFIG), whole.prefix(ids, CONFIG.blocks))
    torch.testing.assert_close(end(kept), whole(ids)[:, -1, words], atol=1e-6, rtol=1e-6)


def test_training_the_end_leaves_the_model_alone() -> None:
    whole = model()
    before = {n: p.clone() for n, p in whole.named_parameters()}
    end = LlamaEnd(whole, 2, torch.tensor([1])).requires_grad_(True)
    for p in end.parameters():
        p.data.add_(1)
    assert all(torch.equal(p, before[n]) for n, p in whole.named_parameters())
    assert [n for n, _ in end.named_buffers()] == ["words"]


def test_no_position_sees_what_comes_later() -> None:
    whole, ids = model(), tokens()
    changed = ids.clone()
    changed[:, 5:] = 0
    torch.testing.assert_close(whole(ids)[:, :5], whole(changed)[:, :5], atol=1e-6, rtol=0)
    assert not torch.allclose(whole(ids)[:, 5:], whole(changed)[:, 5:])


def test_rotary_products_depend_on_the_distance_alone() -> None:
    config = LlamaConfig(vocabulary=2, width=8, blocks=1, heads=1, kv_heads=1, hidden=4)
    angles = rotations(12, config, torch.empty(0))
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 1, 1, 12, 8)
    products = rotate(q, angles)[0, 0] @ rotate(k, angles)[0, 0].T
    for distance in range(-5, 6):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    assert not torch.allclose(products[0, 0], products[0, 5])


def test_attention_is_that_of_repeated_key_value_heads() -> None:
    """A reference that writes out the mask, the softmax and the sharing of heads."""
    torch.manual_seed(0)
    attention = model().blocks[0].get_submodule("attention")
    x = torch.randn(2, 7, 24)
    angles = rotations(7, CONFIG, x)
    q, k, v = (getattr(attention, n)(x).unflatten(-1, (-1, 4)).transpose(1, 2) for n in "qkv")
    q, k = rotate(q, angles), rotate(k, angles)
    k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    scores = (q @ k.transpose(2, 3) / 2).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    expected = attention.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))  # type: ignore[operator]
    torch.testing.assert_close(attention(x, angles), expected, atol=1e-5, rtol=1e-4)


def test_low_rank_updates_start_at_nothing_and_are_all_that_trains() -> None:
    whole, ids = model().requires_grad_(True), tokens()
    before = whole(ids)
    add_lora(whole.blocks[2:], rank=3, alpha=6.0, seed=0)
    assert torch.equal(whole(ids), before)
    names = [n for n, p in whole.blocks[2:].named_parameters() if p.requires_grad]
    assert names == [f"{i}.attention.{layer}.{part}" for i in (0, 1) for layer in "qv" for part in "ab"]
    layer = whole.get_submodule("blocks.3.attention.v")
    assert isinstance(layer, LoRA)
    nn.init.ones_(layer.b)
    x = torch.randn(2, 24)
    merged = layer.base.weight + 2.0 * layer.b @ layer.a
    torch.testing.assert_close(layer(x), x @ merged.T, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="blocks must be without updates; 'q' is a LoRA"):
        add_lora(whole.blocks[2:], rank=3, alpha=6.0, seed=0)


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="got width=24, heads=5, kv_heads=1"):
        LlamaConfig(vocabulary=2, width=24, blocks=1, heads=5, kv_heads=1, hidden=4)
    with pytest.raises(ValueError, match="rank must be >= 1; got 0"):
        add_lora(model().blocks, rank=0, alpha=1.0, seed=0)
