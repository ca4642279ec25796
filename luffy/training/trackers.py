"""Optional experiment trackers beside the run directory, which is always written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import Config

Report = Callable[[dict[str, Any]], None]


def no_report() -> tuple[Report, Callable[[], None]]:
    return lambda row: None, lambda: None


def make_report(config: Config, run_dir: Path) -> tuple[Report, Callable[[], None]]:
    """A function that sends one metrics row to the tracker named by config.report_to, and one that ends it.

    "none" gives functions that do nothing. A resumed run goes on in its tracker under the same name. Raises ImportError
    if the tracker's package is not installed.
    """
    if config.report_to == "none":
        return no_report()
    if config.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run_dir / "tensorboard"))

        def write(row: dict[str, Any]) -> None:
            for name, value in row.items():
                writer.add_scalar(name, value, row["step"])
            writer.flush()

        return write, writer.close
    # trackio has wandb's interface
    tracker = __import__(config.report_to)
    tracker.init(project="luffy", name=run_dir.name, config=config.to_dict(), resume="allow")
    return lambda row: tracker.log(row, step=row["step"]), tracker.finish
