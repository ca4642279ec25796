"""Optional experiment trackers beside the run directory, which is always written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import Config

Report = Callable[[dict[str, Any]], None]


def make_report(config: Config, run_dir: Path) -> Report:
    """A function that sends one metrics row to the tracker named by config.report_to; "none" gives one that does not.

    Raises ImportError if the tracker's package is not installed.
    """
    if config.report_to == "none":
        return lambda row: None
    if config.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run_dir / "tensorboard"))

        def write(row: dict[str, Any]) -> None:
            for name, value in row.items():
                writer.add_scalar(name, value, row["step"])
            writer.flush()

        return write
    # trackio has wandb's interface
    tracker = __import__(config.report_to)
    tracker.init(project="luffy", name=run_dir.name, config=config.to_dict())
    return lambda row: tracker.log(row)
