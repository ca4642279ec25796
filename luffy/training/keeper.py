"""What a run leaves behind while it trains: metrics, samples, checkpoints, the final evaluation. Only the first rank
writes, but for its share of a checkpoint."""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import Config
from ..errors import RunError
from ..methods.rows import Row
from ..runs import RunDirectory, seconds_per_phase, writing
from ..sampling.ranks import Ranks
from . import trackers

log = logging.getLogger(__name__)


def keep_failed(path: Path, facts: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Writes the rows of a batch on which a step has failed, and says where they are, or why they are not."""
    batch = [
        {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in vars(row).items()} for row in rows
    ]
    try:
        with writing(path):
            torch.save({**facts, "rows": batch}, path)
    except RunError as error:
        return f"The batch is lost: {error}"
    return f"The batch is in {path}"


class Keeper:
    """Writes a run's directory, and to its tracker, from where the run begins or is resumed (start_step)."""

    def __init__(self, run: RunDirectory, config: Config, ranks: Ranks, start_step: int) -> None:
        self.run, self.config, self.ranks = run, config, ranks
        self._open = ExitStack()
        self._report: trackers.Report | None = None
        if ranks.first:
            run.keep_metrics_until(start_step or -1)
            self._report, close = trackers.make_report(config, run.path)
            self._open.callback(close)

    def close(self) -> None:
        self._open.close()

    def row(self, row: Mapping[str, Any]) -> None:
        """One line of metrics."""
        if self._report is None:
            return
        self.run.append_metrics(dict(row))
        if row["step"]:
            self._report(dict(row))
            log.info(
                "step %d/%d: reward %.3f, length %.1f, entropy %.3f, %.2f s",
                *(row["step"], self.config.max_steps),
                *(row["reward/mean"], row["length/mean"], row.get("entropy", 0.0), row["time/step"]),
            )

    def samples(self, step: int, make: Callable[[], list[dict[str, Any]]]) -> None:
        """Some rows for people, where the step is one of those to be shown."""
        if self.ranks.first and self.config.sample_steps and step % self.config.sample_steps == 0:
            self.run.write_samples(step, make())

    def checkpoint(self, step: int, write: Callable[[Path, int], None]) -> None:
        """A checkpoint, where one is due. All ranks write into the folder that the first one makes."""
        if step % self.config.save_steps and step != self.config.max_steps:
            return

        def write_all(folder: Path | None, step: int) -> None:
            shared = self.ranks.broadcast(folder)
            assert shared is not None
            write(shared, step)
            self.ranks.barrier()

        if self.ranks.first:
            self.run.save_checkpoint(step, write_all, self.config.save_total_limit)
        else:
            write_all(None, step)

    def trained(self) -> None:
        """After the last step."""
        if self.ranks.first:
            self.run.link_final(self.config.max_steps)
            self.run.add_to_manifest(seconds=seconds_per_phase(self.run.metrics()))

    def complete(self, evaluation: dict[str, Any]) -> None:
        if self.ranks.first:
            self.run.complete(evaluation)
        self.ranks.barrier()


def machine_metrics(device: torch.device, verifier_counts: Mapping[str, int]) -> dict[str, float]:
    """What depends on the machine and its load: never part of what a resumed run must repeat."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {"machine/peak_memory_mb": round(peak, 1)} | {
        f"machine/verifier_{name}": count for name, count in sorted(verifier_counts.items())
    }
