"""Two small tables of numbers from the UCI repository: handwritten digits, and breast cancer (Wisconsin)."""

from __future__ import annotations

import bz2

import numpy as np
import torch

from cograd.core.streams import stream
from cograd.data.files import Origin
from cograd.data.kinds import Images, Table

DIGITS = tuple("0123456789")
N_TRAIN = 1400
DIAGNOSES = ("malignant", "benign")


def digits(origin: Origin) -> Images:
    """1,797 digits, 1 x 8 x 8, float32: counts of 0 .. 16 inked pixels of a 4 x 4 block, divided by 16.

    A fixed random 1,400 are train, the other 397 test.
    """
    with origin.reading("digits.csv.bz2") as raw:
        rows = np.loadtxt(bz2.decompress(raw).decode().splitlines(), delimiter=",", dtype=np.int64)
        if rows.ndim != 2 or rows.shape[1] != 65:
            raise ValueError("every row must have 64 counts and a label")
    order = stream(0, "digits", "split").permutation(len(rows)).numpy()
    mine = rows[np.sort(order[:N_TRAIN] if origin.split == "train" else order[N_TRAIN:])]
    x = torch.from_numpy(mine[:, :64].astype(np.float32) / 16).view(-1, 1, 8, 8)
    return Images(origin.name, origin.split, origin.digest, x, torch.from_numpy(mine[:, 64].copy()), DIGITS)


def breast_cancer(origin: Origin) -> Table:
    """569 tumours by 30 measurements, each centred and divided by its standard deviation; label 1 is benign."""
    with origin.reading("breast-cancer.csv.bz2") as raw:
        header, *lines = bz2.decompress(raw).decode().splitlines()
        rows = np.loadtxt(lines, delimiter=",", dtype=np.float64)
        features = tuple(header.split(",")[:-1])
        if rows.ndim != 2 or rows.shape[1] != len(features) + 1:
            raise ValueError(f"every row must have {len(features)} measurements and a label")
    x = (rows[:, :-1] - rows[:, :-1].mean(0)) / rows[:, :-1].std(0)
    return Table(
        origin.name,
        origin.split,
        origin.digest,
        x=torch.from_numpy(x.astype(np.float32)),
        features=features,
        y=torch.from_numpy(rows[:, -1].astype(np.int64)),
        classes=DIAGNOSES,
        sensitive={},
        groups={},
    )
