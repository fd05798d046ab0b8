"""The fine-tuning of Just One Byte's paper file: is a sentence of the Brown corpus news or fiction?

SmolLM2-135M reads 32 tokens, the beginning of a sentence and "Category:"; the loss is the cross-entropy between
the two label words. Only late blocks are trained, whole or by LoRA, so what the blocks before them give is
computed once for every sentence. Weights and activations are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from cograd import data
from cograd.core.streams import seed_for, stream
from cograd.engines.transport import TorchDist
from cograd.engines.worker import Context
from cograd.machines.one_byte.optimizer import OneByte
from cograd.models import smollm2
from cograd.models.llama import Llama, LlamaEnd, add_lora, through

if TYPE_CHECKING:
    from cograd.papers._lab import Record

Rows: TypeAlias = tuple[Tensor, Tensor]
Training: TypeAlias = tuple[Callable[[int], None], Callable[[], dict[str, Any]]]
"""A step, and what to record at the end."""

MACHINES, SAMPLES, BATCH, LENGTH = 2, 4, 4, 32
GENRES, WORDS, PROMPT = ("news", "fiction"), (" news", " fiction"), "\nCategory:"
TRAIN, VALIDATION = 512, 400
EVERY = 15
MODES = {"last block": (29, 0, 1e-3), "LoRA": (24, 4, 1e-2)}
"""Of each mode: the first trainable block, LoRA's rank (0: the blocks themselves), and eps as MeZO has it."""


class Task:
    """The trainable end of the model, and what enters it: (N, LENGTH, width), with labels (N,)."""

    def __init__(self, end: LlamaEnd, train: Rows, val: Rows) -> None:
        self.end, self.train, self.val = end, train, val

    def loss(self, rows: Tensor) -> Tensor:
        hidden, labels = self.train
        return F.cross_entropy(self.end(hidden[rows]), labels[rows])

    @torch.inference_mode()
    def evaluate(self, rank: int) -> tuple[float, float]:
        """Validation loss in nats, and accuracy in percent, on this rank's share of the sentences."""
        hidden, labels = (part[rank::MACHINES] for part in self.val)
        scores = torch.cat([self.end(part) for part in hidden.split(50)])
        return float(F.cross_entropy(scores, labels)), 100 * float((scores.argmax(1) == labels).float().mean())


def warm(_: Context) -> None:
    """Compute what the trainings share, so that no rank is still at it when the other waits in a collective."""
    for first, *_rest in MODES.values():
        _features(first)


def train(ctx: Context, system: str, seed: int, mode: str, rounds: int, lr: float, **_: Any) -> Record:
    """One fine-tuning: one byte an estimate on both machines, or Adam with the same sentences, alike on both.

    ``history`` has (round, loss, accuracy) on this rank's share of the validation sentences.
    """
    task = prepare(mode, seed)
    step, finish = (_adam if system.startswith("Adam") else _one_byte)(ctx, task, mode, seed, lr)
    history: list[list[float]] = [[0, *task.evaluate(ctx.rank)]]
    for t in range(rounds):
        step(t)
        if (t + 1) % EVERY == 0:
            history.append([t + 1, *task.evaluate(ctx.rank)])
            ctx.progress(round=t + 1, loss=history[-1][1])
    return {"history": history, **finish()}


def _one_byte(ctx: Context, task: Task, mode: str, seed: int, lr: float) -> Training:
    """Rounds with the other machine; at the end what was sent and what came of it."""
    zo = OneByte(task.end, lr, eps=MODES[mode][2], samples=SAMPLES, seed=seed, transport=TorchDist())

    def step(t: int) -> None:
        zo.step(task.loss, rows_of(seed, t, ctx.rank))

    def finish() -> Record:
        return {
            "fingerprint": zo.fingerprint(),
            "payload": zo.ledger.sent(ctx.rank),
            "frames": zo.ledger.sent(ctx.rank, "frame"),
            "elements": zo.space.numel,
            "log": len(zo.log.to_bytes()),
        }

    return step, finish


def _adam(ctx: Context, task: Task, mode: str, seed: int, lr: float) -> Training:
    """Steps on all sentences that the machines use in a round."""
    adam = torch.optim.Adam([p for p in task.end.parameters() if p.requires_grad], lr)

    def step(t: int) -> None:
        adam.zero_grad()
        task.loss(torch.cat([rows for m in range(MACHINES) for rows in rows_of(seed, t, m)])).backward()
        adam.step()

    return step, dict


def rows_of(seed: int, round: int, machine: int) -> list[Tensor]:
    """A machine's minibatches: of the training sentences every second one is its own."""
    return [
        MACHINES * stream(seed, "batch", round, machine, s).choice(TRAIN // MACHINES, BATCH) + machine
        for s in range(SAMPLES)
    ]


def prepare(mode: str, seed: int) -> Task:
    """A fresh copy of the trainable end and its rows."""
    first, rank, _ = MODES[mode]
    model, tokenizer = _model()
    words = torch.tensor([tokenizer.encode(word).ids[0] for word in WORDS])
    end = LlamaEnd(model, first, words).requires_grad_(False)
    if rank:
        add_lora(end.blocks, rank, alpha=2.0 * rank, seed=seed_for(seed, "lora"))
    else:
        end.blocks.requires_grad_(True)
    return Task(end, *_features(first))


@lru_cache
def _model() -> tuple[Llama, Any]:
    model, tokenizer = smollm2.load()
    return model.requires_grad_(False), tokenizer


@lru_cache
def _features(first: int) -> tuple[Rows, Rows]:
    """What enters block ``first`` for all training and all validation sentences, with their labels."""
    model, tokenizer = _model()
    earlier = max((mode[0] for mode in MODES.values() if mode[0] < first), default=0)
    if earlier:
        blocks = model.blocks[earlier:first]
        train, val = ((through(blocks, hidden, model.config), labels) for hidden, labels in _features(earlier))
        return train, val
    train, val = (sentences(tokenizer, part, count) for part, count in (("train", TRAIN), ("val", VALIDATION)))
    return (_prefix(model, train, first), _prefix(model, val, first))


def _prefix(model: Llama, rows: Rows, first: int) -> Rows:
    ids, labels = rows
    return torch.cat([model.prefix(part, first) for part in ids.split(16)]), labels


def sentences(tokenizer: Any, part: str, count: int) -> Rows:
    """Token ids (count, LENGTH) and labels, half of each genre, from sentences long enough to need no padding.

    Every fourth file of a genre is for validation, so no text is in both parts.
    """
    prompt = tokenizer.encode(PROMPT).ids
    length = LENGTH - len(prompt)
    ids, labels = [], []
    brown = data.load("brown")
    for label, genre in enumerate(GENRES):
        files = sorted({row.file for row in brown if row.genre == genre})
        mine = {file for i, file in enumerate(files) if (i % 4 == 3) == (part == "val")}
        long = [
            tokens[:length] + prompt
            for row in brown
            if row.file in mine and len(tokens := tokenizer.encode(" ".join(row.tokens)).ids) >= length
        ]
        chosen = stream(0, "brown", part, genre).permutation(len(long))[: count // 2]
        ids += [long[i] for i in chosen.tolist()]
        labels += [label] * len(chosen)
    return torch.tensor(ids), torch.tensor(labels)


def perplexity(_: Context) -> float:
    """Of the model on the first 512 tokens of Brown's news: a check that the weights were read aright."""
    model, tokenizer = _model()
    news = islice((row for row in data.load("brown") if row.genre == "news"), 40)
    ids = torch.tensor([tokenizer.encode(" ".join(" ".join(row.tokens) for row in news)).ids[:512]])
    return math.exp(float(F.cross_entropy(model(ids)[0, :-1], ids[0, 1:])))
