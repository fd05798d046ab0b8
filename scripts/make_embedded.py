"""Rebuild the data sets that ship inside the package, byte for byte, from the full ones in $COGRAD_DATA.

    COGRAD_DATA=... python scripts/make_embedded.py

The two small UCI tables come from an installed scikit-learn.

Images are rows of the full parquet files with their encoded bytes untouched (PNG, JPEG), so nothing is lost
and they read with the code that reads the full sets: 400 of each class for training and 100 for testing,
chosen and ordered by a stream of cograd. The text is whole. The same bytes need the same versions of pyarrow
and of bzip2, which write the files, and of numpy, whose generator chooses the rows; digests.json is what the
library checks.
"""

from __future__ import annotations

import bz2
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cograd.core.streams import stream
from cograd.data import files
from cograd.data.catalogue import CATALOGUE

HERE = Path(__file__).resolve().parent.parent / "src" / "cograd" / "data" / "embedded"
PER_CLASS = {"train": 400, "test": 100}


def images(full: Path, name: str, column: str) -> None:
    """Write the balanced subsets of the train and test files of a set."""
    for split, per_class in PER_CLASS.items():
        table = pq.read_table(full / f"{split}.parquet")
        labels = table["label"].to_numpy()
        chosen = []
        for label in range(10):
            rows = np.flatnonzero(labels == label)
            chosen.append(rows[stream(0, "embedded", name, split, label).choice(len(rows), per_class).numpy()])
        rows = np.concatenate(chosen)
        rows = rows[stream(0, "embedded", name, split, "order").permutation(len(rows)).numpy()]
        encoded = [table[column][int(i)]["bytes"].as_py() for i in rows]
        subset = pa.table(
            {
                column: pa.array([{"bytes": image} for image in encoded], pa.struct([("bytes", pa.binary())])),
                "label": pa.array(labels[rows], pa.int64()),
            }
        )
        # Without a dictionary, which cannot help where no image repeats; zstd takes out the shared headers.
        pq.write_table(
            subset,
            HERE / f"{name}-{split}.parquet",
            compression="zstd",
            compression_level=19,
            use_dictionary=False,
            write_statistics=False,
            data_page_size=2**26,
        )


def uci() -> None:
    """Write the digits and the breast-cancer measurements as scikit-learn has them."""
    from sklearn import datasets

    digits = datasets.load_digits()
    rows = np.column_stack([digits.data, digits.target]).astype(int)
    _write("digits.csv.bz2", [",".join(map(str, row)) for row in rows.tolist()])
    cancer = datasets.load_breast_cancer()
    names = [name.replace(" ", "_") for name in cancer.feature_names]
    lines = [
        ",".join(map(repr, [*row, label]))
        for row, label in zip(cancer.data.tolist(), cancer.target.tolist(), strict=True)
    ]
    _write("breast-cancer.csv.bz2", [",".join([*names, "benign"]), *lines])


def _write(file: str, lines: list[str]) -> None:
    (HERE / file).write_bytes(bz2.compress("".join(line + "\n" for line in lines).encode()))


def main() -> None:
    """Write every embedded file, then the record of their digests."""
    full = Path(os.environ["COGRAD_DATA"])
    HERE.mkdir(exist_ok=True)
    images(full / "mnist", "mnist-5k", "image")
    images(full / "cifar10", "cifar-5k", "img")
    text = (full / "tinyshakespeare" / "input.txt").read_bytes()
    (HERE / "tiny-shakespeare.txt.bz2").write_bytes(bz2.compress(text))
    uci()
    digests = {
        name: files.digest(files.embedded(source.files))
        for name, source in CATALOGUE.items()
        if source.embedded
    }
    (HERE / "digests.json").write_text(json.dumps(digests, indent=2) + "\n")
    for path in sorted(HERE.iterdir()):
        print(f"{path.stat().st_size:>9,}  {path.name}")


if __name__ == "__main__":
    main()
