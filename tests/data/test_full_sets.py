"""The readers of the full sets, on tiny files of their formats made here."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cograd import data
from cograd.data import images


def write_images(path: Path, column: str, arrays: list[np.ndarray], labels: list[int]) -> None:
    def png(array: np.ndarray) -> bytes:
        target = io.BytesIO()
        Image.fromarray(array).save(target, "PNG")
        return target.getvalue()

    rows = [{"bytes": png(array), "path": f"{i}.png"} for i, array in enumerate(arrays)]
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({column: rows, "label": labels}), path)


def random_images(n: int, *shape: int) -> list[np.ndarray]:
    generator = np.random.default_rng(n)
    return [generator.integers(0, 256, shape, dtype=np.uint8) for _ in range(n)]


@pytest.fixture
def mnist(given: Path) -> list[np.ndarray]:
    """Three fake training digits and two to test on; gives the former."""
    arrays = random_images(3, 28, 28)
    write_images(given / "mnist" / "train.parquet", "image", arrays, [7, 0, 9])
    write_images(given / "mnist" / "test.parquet", "image", random_images(2, 28, 28), [1, 2])
    return arrays


def test_grey_images_read_bit_for_bit(mnist: list[np.ndarray]) -> None:
    train = data.load("mnist", dtype=torch.uint8)
    assert torch.equal(train.x, torch.from_numpy(np.stack(mnist))[:, None])
    assert train.y.tolist() == [7, 0, 9]
    assert len(data.load("mnist", "test")) == 2
    assert data.load("mnist", "test").digest == train.digest == data.digest("mnist")


def test_colour_images_read_bit_for_bit(given: Path) -> None:
    arrays = random_images(2, 32, 32, 3)
    for split in ("train", "test"):
        write_images(given / "cifar10" / f"{split}.parquet", "img", arrays, [9, 3])
    loaded = data.load("cifar10", "test", dtype=torch.uint8)
    assert torch.equal(loaded.x, torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2))
    assert [loaded.classes[i] for i in loaded.y.tolist()] == ["truck", "cat"]


@pytest.mark.usefixtures("mnist")
def test_a_second_load_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = data.load("mnist")
    monkeypatch.setattr(images, "_decode", None)
    second = data.load("mnist")
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.y, second.y)


@pytest.mark.usefixtures("mnist")
def test_another_file_is_decoded_anew(given: Path) -> None:
    first = data.load("mnist")
    arrays = random_images(4, 28, 28)
    write_images(given / "mnist" / "train.parquet", "image", arrays, [1, 1, 1, 1])
    second = data.load("mnist")
    assert second.digest != first.digest
    assert len(second) == 4


def test_a_cut_off_cache_is_decoded_anew(cache: Path, mnist: list[np.ndarray]) -> None:
    data.load("mnist")
    (kept,) = (cache / "decoded").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert len(data.load("mnist")) == len(mnist)


def test_a_cache_that_cannot_be_written_does_no_harm(cache: Path, mnist: list[np.ndarray]) -> None:
    cache.write_bytes(b"a file where the folder should be")
    assert len(data.load("mnist")) == len(mnist)


@pytest.mark.usefixtures("mnist")
@pytest.mark.parametrize(
    ("arrays", "labels", "message"),
    [
        (random_images(1, 27, 28), [1], r"image 0 is \(28, 27\), not \(28, 28\)"),
        (random_images(1, 28, 28), [10], "labels must be there and in 0 .. 9"),
    ],
)
def test_images_of_another_set_are_refused(
    given: Path, arrays: list[np.ndarray], labels: list[int], message: str
) -> None:
    write_images(given / "mnist" / "train.parquet", "image", arrays, labels)
    with pytest.raises(data.DataDamaged, match=message):
        data.load("mnist")


@pytest.mark.usefixtures("mnist")
def test_a_cut_off_file_is_named(given: Path) -> None:
    path = given / "mnist" / "train.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(data.DataDamaged, match=r"train.parquet is not what mnist should have there"):
        data.load("mnist")


@pytest.mark.usefixtures("mnist")
def test_an_image_that_is_none_is_refused(given: Path) -> None:
    table = pa.table({"image": [{"bytes": b"GIF89a", "path": "0.gif"}], "label": [1]})
    pq.write_table(table, given / "mnist" / "train.parquet")
    with pytest.raises(data.DataDamaged, match="UnidentifiedImageError"):
        data.load("mnist")


ADULT = """\
39, State-gov, 77516, Bachelors, 13, Divorced, Adm-clerical, Husband, White, Male, 2174, 0, 40, Cuba, <=50K
50, ?, 83311, Bachelors, 13, Divorced, Sales, Husband, White, Male, 0, 0, 13, Cuba, <=50K
28, Private, 338409, Masters, 14, Divorced, Sales, Wife, Black, Female, 0, 0, 40, India, >50K

"""


def test_adult_encodes_numbers_and_values(given: Path) -> None:
    (given / "adult").mkdir()
    (given / "adult" / "adult.data").write_text(ADULT)
    table = data.load("adult")
    assert table.y.tolist() == [0, 0, 1]
    column = dict(zip(table.features, table.x.T, strict=True))
    ages = np.array([39, 50, 28])
    assert column["age"].tolist() == pytest.approx(((ages - ages.mean()) / ages.std()).tolist())
    assert column["capital-loss"].tolist() == [0, 0, 0]
    assert [feature for feature in table.features if feature.startswith("workclass")] == [
        "workclass=Private",
        "workclass=State-gov",
    ]
    assert column["workclass=Private"].tolist() == [0, 0, 1]
    assert column["workclass=State-gov"].tolist() == [1, 0, 0]
    assert repr(table) == "Table(adult/train: 3 x 21 float32, 2 classes, sensitive: sex, race)"
    assert table.groups == {"sex": ("Female", "Male"), "race": ("Black", "White")}
    assert table.sensitive["sex"].tolist() == [1, 1, 0]
    assert table.sensitive["race"].tolist() == [1, 1, 0]


def test_adult_without_a_column(given: Path) -> None:
    (given / "adult").mkdir()
    (given / "adult" / "adult.data").write_text(ADULT)
    table = data.load("adult")
    less = table.without("sex", "education")
    assert set(table.features) - set(less.features) == {
        "sex=Female",
        "sex=Male",
        "education=Bachelors",
        "education=Masters",
    }
    assert "education-num" in less.features
    assert less.x.shape == (3, len(less.features))
    assert "sex" in less.sensitive
    with pytest.raises(ValueError, match="no column 'gender' in adult; it has age, workclass,"):
        table.without("gender")


def test_adult_refuses_other_rows(given: Path) -> None:
    (given / "adult").mkdir()
    (given / "adult" / "adult.data").write_text("39, State-gov\n")
    with pytest.raises(data.DataDamaged, match="every row must have 15 values"):
        data.load("adult")


def test_gsm8k_reads_final_numbers(given: Path) -> None:
    folder = given / "gsm8k"
    folder.mkdir()
    # U+2028 ends a line for str.splitlines, not for JSON lines
    entries = [{"question": "q\u2028?", "answer": "a\n#### 1,080"}, {"question": "r", "answer": "#### -3"}]
    for split in ("train", "test"):
        lines = (json.dumps(entry, ensure_ascii=False) for entry in entries)
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    rows = data.load("gsm8k").rows
    assert rows == (("q\u2028?", "a\n#### 1,080", 1080), ("r", "#### -3", -3))
    (folder / "train.jsonl").write_text('{"question": "r", "answer": "none"}\n')
    with pytest.raises(data.DataDamaged, match=r"train.jsonl is not what gsm8k should have"):
        data.load("gsm8k")


def test_sst2_refuses_another_label(given: Path) -> None:
    (given / "sst2").mkdir()
    for part in ("train", "dev", "test"):
        (given / "sst2" / f"{part}.tsv").write_text("so so\t2\n")
    with pytest.raises(data.DataDamaged, match="label '2'"):
        data.load("sst2", "val")


# The Planetoid files were written by Python 2, which Python 3 cannot write; so by hand, opcode by opcode.


def string(text: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(text)) + text


def integers(*values: int) -> bytes:
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


def array(values: np.ndarray) -> bytes:
    """A numpy array as Python 2 pickled it (without the header and the final stop)."""
    kind = values.dtype.str[1:].encode()
    dtype = b"cnumpy\ndtype\n(" + string(kind) + b"K\x00K\x01tR(K\x03" + string(b"<")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + string(b"b") + b"tR"
    return empty + b"(K\x01" + integers(*values.shape) + dtype + b"\x89" + string(values.tobytes()) + b"tb"


def csr(matrix: np.ndarray) -> bytes:
    rows, columns = matrix.nonzero()
    starts = np.concatenate([[0], np.cumsum(np.count_nonzero(matrix, axis=1))]).astype(np.int32)
    state = b"}(" + string(b"_shape") + integers(*matrix.shape)
    state += string(b"data") + array(matrix[rows, columns])
    state += string(b"indices") + array(columns.astype(np.int32))
    state += string(b"indptr") + array(starts) + b"u"
    return b"cscipy.sparse.csr\ncsr_matrix\n)\x81" + state + b"b"


def adjacency(neighbours: dict[int, list[int]]) -> bytes:
    items = b"".join(
        integers(node)[1:-1] + b"](" + integers(*near)[1:-1] + b"e" for node, near in neighbours.items()
    )
    return b"ccollections\ndefaultdict\n(c__builtin__\nlist\ntR(" + items + b"u"


FEATURES = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 1]], dtype=np.float32)
CLASSES = np.eye(2, dtype=np.int32)[[0, 1, 1, 0, 0, 1]]


@pytest.fixture
def cora(given: Path) -> Path:
    """Six nodes: 0 and 1 train, 2 validates, 3 and 5 test in the order 5, 3, and no file describes 4."""
    folder = given / "cora"
    folder.mkdir()
    parts = {
        "x": csr(FEATURES[:2]),
        "y": array(CLASSES[:2]),
        "allx": csr(FEATURES[:3]),
        "ally": array(CLASSES[:3]),
        "tx": csr(FEATURES[[5, 3]]),
        "ty": array(CLASSES[[5, 3]]),
        "graph": adjacency({0: [1, 1, 0], 1: [0, 5], 2: [], 5: [3]}),
    }
    for part, raw in parts.items():
        (folder / f"ind.cora.{part}").write_bytes(b"\x80\x02" + raw + b".")
    (folder / "ind.cora.test.index").write_text("5\n3\n")
    return folder


@pytest.mark.usefixtures("cora")
def test_planetoid_puts_every_node_at_its_index() -> None:
    graph = data.load("cora")
    assert graph.x.tolist() == FEATURES.tolist()
    assert graph.y.tolist() == [0, 1, 1, 0, -1, 1]
    assert graph.edges.tolist() == [[0, 1, 1, 3, 5, 5], [1, 0, 5, 5, 1, 3]]
    assert graph.n_classes == 2
    assert repr(graph) == "Graph(cora/all: 6 x 3 float32, 6 directed edges, 2 classes, 2/1/2 nodes)"
    assert (graph.train.tolist(), graph.val.tolist(), graph.test.tolist()) == ([0, 1], [2], [3, 5])


@pytest.mark.parametrize(
    "attack",
    [
        b"cos\nsystem\n(S'exit 1'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"cnumpy\nfromfile\n(S'x'\ntR.",
        b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93.",
    ],
)
def test_planetoid_runs_nothing_that_a_pickle_asks_for(cora: Path, attack: bytes) -> None:
    (cora / "ind.cora.graph").write_bytes(attack)
    with pytest.raises(data.DataDamaged, match="a Planetoid file has no business with"):
        data.load("cora")


@pytest.mark.parametrize(
    ("part", "raw", "message"),
    [
        ("x", b"\x80\x02" + array(CLASSES) + b"", "ind.cora.x is not what cora should have"),
        ("allx", b"\x80\x02]. ", "it must hold a matrix of numbers"),
        ("ty", b"\x80\x02" + array(CLASSES) + b".", "the test nodes do not fit"),
        ("graph", b"\x80\x02" + adjacency({0: [6]}) + b".", "nodes must be in 0 .. 5"),
        ("tx", b"\x80\x02" + csr(FEATURES).replace(integers(6, 3), integers(9, 3)) + b".", "row pointers"),
    ],
)
def test_planetoid_refuses_files_that_do_not_fit(cora: Path, part: str, raw: bytes, message: str) -> None:
    (cora / f"ind.cora.{part}").write_bytes(raw)
    with pytest.raises(data.DataDamaged, match=message):
        data.load("cora")
