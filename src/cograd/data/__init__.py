"""Data sets by name.

>>> from cograd import data
>>> train = data.load("mnist-5k")

`load` gives a small frozen dataclass: `Images`, `Text`, `Table`, `Graph` or `Records`; `names` lists the
sets; `digest` says which bytes a set was read from.
"""

from cograd.data.files import DataDamaged, DataUnavailable
from cograd.data.kinds import DataSet, Graph, Images, Problem, Records, Sentence, Table, Tagged, Text
from cograd.data.loading import Info, digest, load, names

__all__ = [
    "DataDamaged",
    "DataSet",
    "DataUnavailable",
    "Graph",
    "Images",
    "Info",
    "Problem",
    "Records",
    "Sentence",
    "Table",
    "Tagged",
    "Text",
    "digest",
    "load",
    "names",
]
