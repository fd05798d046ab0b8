"""UCI Adult: does a person of the 1994 census earn more than 50,000 dollars a year?"""

from __future__ import annotations

import numpy as np
import torch

from cograd.data.files import Origin
from cograd.data.kinds import Table

COLUMNS = (
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation"),
    *("relationship", "race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country"),
)
NUMERIC = ("age", "fnlwgt", "education-num", "capital-gain", "capital-loss", "hours-per-week")
SENSITIVE = ("sex", "race")
CLASSES = ("<=50K", ">50K")


def adult(origin: Origin) -> Table:
    """The rows of ``adult.data`` as features, in the file's order of columns.

    A numeric column is centred and divided by its standard deviation over all rows (by 1 where that is 0).
    Any other column is one-hot over the values found, sorted; an unknown value (``?``) is all zeros. The real
    file gives 105 features. Label 1 is an income above 50,000 dollars.
    """
    with origin.reading("adult.data") as raw:
        rows = [line.split(", ") for line in raw.decode().split("\n") if line]
        if any(len(row) != len(COLUMNS) + 1 for row in rows):
            raise ValueError(f"every row must have {len(COLUMNS) + 1} values")
        *columns, incomes = (np.array(column) for column in zip(*rows, strict=True))
        by_name = dict(zip(COLUMNS, columns, strict=True))
        y = torch.tensor([CLASSES.index(income) for income in incomes.tolist()])
        blocks = [_encode(name, values) for name, values in by_name.items()]
    sensitive = {name: np.unique(by_name[name], return_inverse=True) for name in SENSITIVE}
    return Table(
        origin.name,
        origin.split,
        origin.digest,
        x=torch.from_numpy(np.concatenate([block for _, block in blocks], axis=1)),
        features=tuple(feature for features, _ in blocks for feature in features),
        y=y,
        classes=CLASSES,
        sensitive={name: torch.from_numpy(codes.astype(np.int64)) for name, (_, codes) in sensitive.items()},
        groups={name: tuple(values.tolist()) for name, (values, _) in sensitive.items()},
    )


def _encode(name: str, values: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names of the features of a column, and their values (N x features, float32)."""
    if name in NUMERIC:
        numbers = values.astype(np.float64)
        scaled = (numbers - numbers.mean()) / (numbers.std() or 1.0)
        return [name], scaled[:, None].astype(np.float32)
    known = [value for value in np.unique(values).tolist() if value != "?"]
    return [f"{name}={value}" for value in known], (values[:, None] == np.array(known)).astype(np.float32)
