"""Texts: tiny-shakespeare as characters, and GSM8K, SST-2 and the Brown corpus as rows."""

from __future__ import annotations

import bz2
import json
import sys

import numpy as np
import torch

from cograd.data.files import Origin
from cograd.data.kinds import Problem, Records, Sentence, Tagged, Text

GENRES = {
    "a": ("news", 44),
    "b": ("editorial", 27),
    "c": ("reviews", 17),
    "d": ("religion", 17),
    "e": ("hobbies", 36),
    "f": ("lore", 48),
    "g": ("belles_lettres", 75),
    "h": ("government", 30),
    "j": ("learned", 80),
    "k": ("fiction", 29),
    "l": ("mystery", 24),
    "m": ("science_fiction", 6),
    "n": ("adventure", 29),
    "p": ("romance", 29),
    "r": ("humor", 9),
}
"""Of the Brown corpus: the letter that its files bear, the genre it stands for, and how many texts it has."""

BROWN_FILES = tuple(f"c{letter}{i:02d}" for letter, (_, n) in GENRES.items() for i in range(1, n + 1))


def shakespeare(origin: Origin) -> Text:
    """Characters of the plays; the vocabulary is every distinct character of the whole text, sorted.

    Split by position: the first 90 % are train, the next 5 % val, the rest test.
    """
    with origin.reading("tiny-shakespeare.txt.bz2") as raw:
        text = bz2.decompress(raw).decode()
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    values, tokens = np.unique(codes, return_inverse=True)
    n = len(codes)
    start, stop = {"train": (0, n * 90 // 100), "val": (n * 90 // 100, n * 95 // 100)}.get(
        origin.split, (n * 95 // 100, n)
    )
    part = torch.from_numpy(tokens.astype(np.int64)[start:stop].copy())
    return Text(origin.name, origin.split, origin.digest, part, tuple(map(chr, values.tolist())))


def gsm8k(origin: Origin) -> Records[Problem]:
    """Grade-school maths; the final number is what follows ``####``."""
    with origin.reading(f"{origin.split}.jsonl") as raw:
        rows = []
        for line in raw.splitlines():  # of bytes: only at line ends, not at Unicode's other separators
            entry = json.loads(line)
            final = int(entry["answer"].rsplit("####", 1)[1].replace(",", ""))
            rows.append(Problem(entry["question"], entry["answer"], final))
    return Records(origin.name, origin.split, origin.digest, tuple(rows))


def sst2(origin: Origin) -> Records[Sentence]:
    """Sentences of film reviews, tokenised and in lower case; label 1 is positive, 0 negative."""
    with origin.reading(f"{'dev' if origin.split == 'val' else origin.split}.tsv") as raw:
        rows = []
        for line in raw.splitlines():
            sentence, label = line.decode().rsplit("\t", 1)
            if label not in ("0", "1"):
                raise ValueError(f"label {label!r}")
            rows.append(Sentence(sentence, int(label)))
    return Records(origin.name, origin.split, origin.digest, tuple(rows))


def brown(origin: Origin) -> Records[Tagged]:
    """American English of 1961: a row for each sentence, which in the files is a line of ``word/tag``."""
    rows = []
    for file in origin.files:
        genre = GENRES[file[1]][0]
        with origin.reading(file) as raw:
            for line in raw.splitlines():
                # A word may hold a slash; its tag is what follows the last. Interned, as most words repeat.
                pairs = [pair.rsplit("/", 1) for pair in line.decode().split()]
                if pairs:
                    words = tuple(sys.intern(word) for word, _ in pairs)
                    rows.append(Tagged(words, tuple(sys.intern(tag) for _, tag in pairs), genre, file))
    return Records(origin.name, origin.split, origin.digest, tuple(rows))
