"""The numbers that the paper has published (published/*.csv, each with its source)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

PUBLISHED = Path(__file__).parent / "published"


def read_published(table: str, version: str = "v5") -> pd.DataFrame:
    """The numbers of a table of the paper: columns group, model, benchmark (as in data/benchmarks.py; "id" and "ood"
    are the paper's averages), accuracy in percent, source. version: of the arXiv paper, "v5" or "v1" where it differs.

    Raises ValueError if there is no such table or version.
    """
    import pandas as pd

    path = PUBLISHED / f"{table}.csv"
    if not path.is_file():
        raise ValueError(f"no published table {table!r}: there are {sorted(p.stem for p in PUBLISHED.glob('*.csv'))}")
    frame = pd.read_csv(path)
    chosen = frame[frame["version"] == version].drop(columns="version").reset_index(drop=True)
    if chosen.empty:
        raise ValueError(f"{table} has no version {version!r}: there are {sorted(set(frame['version']))}")
    return chosen
