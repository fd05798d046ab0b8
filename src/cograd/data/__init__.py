"""Data sets by name, and how a set is split among parties.

>>> from cograd import data
>>> train = data.load("mnist-5k")
>>> split = data.dirichlet(train.y, parties=10, alpha=0.3, seed=0)
>>> print(split.report(train.y))

`load` gives a small frozen dataclass: `Images`, `Text`, `Table`, `Graph` or `Records`; `names` lists the
sets; `digest` says which bytes a set was read from. `iid`, `dirichlet`, `shards` and `by_source` give a
`Partition`, whose report is a `Heterogeneity`; `batches` is an epoch's shuffled mini-batches.
"""

from cograd.data.files import DataDamaged, DataUnavailable
from cograd.data.kinds import DataSet, Graph, Images, Problem, Records, Sentence, Table, Tagged, Text
from cograd.data.loading import Info, digest, load, names
from cograd.data.partition import (
    Heterogeneity,
    Partition,
    batches,
    by_source,
    dirichlet,
    iid,
    shards,
)

__all__ = [
    "DataDamaged",
    "DataSet",
    "DataUnavailable",
    "Graph",
    "Heterogeneity",
    "Images",
    "Info",
    "Partition",
    "Problem",
    "Records",
    "Sentence",
    "Table",
    "Tagged",
    "Text",
    "batches",
    "by_source",
    "digest",
    "dirichlet",
    "iid",
    "load",
    "names",
    "shards",
]
