"""Small reference models, each readable top to bottom."""

from cograd.models.gpt import GPT
from cograd.models.llama import Llama, LlamaConfig
from cograd.models.mlp import MLP

__all__ = ["GPT", "MLP", "Llama", "LlamaConfig"]
