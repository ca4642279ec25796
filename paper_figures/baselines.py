"""What the committed runs must look like: the data and the picture behind every table and figure, kept in baselines/.

`python -m paper_figures.baselines` compares and fails if one has drifted; with --accept it takes what is drawn now as
the new baseline. Numbers may differ by RELATIVE of their size, pictures by RMS grey levels (matplotlib's comparison).
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from luffy.study import style

from . import FIGURES, TABLES, claims, draw, module, report
from .runs import Runs, load

FOLDER = Path(__file__).parent / "baselines"
RELATIVE, ABSOLUTE = 1e-4, 1e-9
RMS = 3.0
DPI = 80
README = ("map", "figure5_dynamics")  # pictures that the README shows, finer
PICTURES = Path(__file__).parents[1] / "notebooks" / "pictures"


def frames(runs: Runs) -> dict[str, pd.DataFrame]:
    """The data behind every table and figure and of the claims, as they come back from a CSV file."""
    made = {name: module(name).data(runs) for name in (*TABLES, *FIGURES)}
    made |= {"claims": claims.table(runs), "sensitivity": claims.sensitivity(runs), "spread": claims.spread(runs)}
    return {
        name: pd.read_csv(io.StringIO(_text(frame))) if len(frame.columns) else frame for name, frame in made.items()
    }


def _text(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, float_format="%.6g")


def accept(runs: Runs, folder: Path = FOLDER) -> None:
    """Takes what is drawn now as the baseline."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in frames(runs).items():
        (folder / f"{name}.csv").write_text(_text(frame))
    for name in FIGURES:
        _picture(name, runs, folder / f"{name}.png")
    if folder == FOLDER:
        for path, said in report.texts(runs).items():
            path.write_text(said)
        for name in README:
            _picture(name, runs, PICTURES / f"{name}.png", dpi=style.DPI)


def drift(runs: Runs, folder: Path = FOLDER, pictures: Sequence[str] = FIGURES) -> list[str]:
    """What differs from the baseline, a line each; empty if nothing does. pictures: those to be drawn and compared."""
    from matplotlib.testing.compare import compare_images

    found = [
        f"{path.name}: it does not say what the runs say"
        for path, said in report.texts(runs).items()
        if not path.is_file() or path.read_text() != said
    ]
    for name, frame in frames(runs).items():
        try:
            expected = pd.read_csv(folder / f"{name}.csv")
        except FileNotFoundError:
            found.append(f"{name}: no baseline")
            continue
        except pd.errors.EmptyDataError:
            expected = pd.DataFrame()
        try:
            pd.testing.assert_frame_equal(frame, expected, check_dtype=False, rtol=RELATIVE, atol=ABSOLUTE)
        except AssertionError as error:
            found.append(f"{name}: the data has changed: {' '.join(str(error).split())[:200]}")
    with tempfile.TemporaryDirectory() as scratch:
        for name in pictures:
            if not (folder / f"{name}.png").is_file():
                found.append(f"{name}: no baseline picture")
                continue
            _picture(name, runs, Path(scratch) / f"{name}.png")
            # the expected picture goes beside the new one, because a comparison leaves a third
            (Path(scratch) / f"{name}-expected.png").write_bytes((folder / f"{name}.png").read_bytes())
            expected_file, file = (str(Path(scratch) / f"{name}{end}.png") for end in ("-expected", ""))
            difference = compare_images(expected_file, file, tol=RMS, in_decorator=True)
            if difference:
                found.append(f"{name}: the picture has changed (RMS {difference['rms']:.1f}, tolerance {RMS})")
    return found


def _picture(name: str, runs: Runs, path: Path, dpi: int = DPI) -> None:
    import matplotlib.pyplot as plt

    figure = draw(name, runs)
    with plt.rc_context(style.RC):
        figure.savefig(path, dpi=dpi, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accept", action="store_true", help="take what is drawn now as the new baseline")
    if parser.parse_args().accept:
        accept(load())
    else:
        found = drift(load())
        sys.exit("\n".join(found) if found else 0)


if __name__ == "__main__":
    main()
