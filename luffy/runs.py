"""The run directory: what a run writes, so that it can be read while it runs, resumed however it ended, and redrawn.

    config.json         every field, resolved; enough to start the run again
    manifest.json       code and package versions, machine, seeds, data fingerprint
    metrics.jsonl       one row a step, appended and flushed
    samples/            step-NNNNNN.json: some prompts with all completions, rewards and advantages
    checkpoints/        step-NNNNNN/: the model in Hugging Face layout, optimizer.pt, trainer.json, checkpoint.json
    evaluation.json     the final evaluation; written last, its presence means the run is complete
    final               link to the last checkpoint

A checkpoint is written aside and renamed into place with a list of its files' hashes, so one that is there is whole,
or is recognised as not being so.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

from . import config as configs
from . import display
from .config import Config, upgraded
from .errors import ConfigError, RunError

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "datasets", "math-verify", "numpy", "vllm", "deepspeed")


class RunDirectory:
    """One run directory. Creating the object touches nothing on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    def _repr_html_(self) -> str:
        row, rows = self.last_row(), {"state": "not begun"}
        if (self.path / "config.json").exists():
            config = self.config()
            state = "complete" if self.is_complete else "running" if self.is_running else "stopped"
            rows = {"state": f"{state}, step {row.get('step', 0)} of {config.max_steps}"}
            rows |= {"method": config.method.label, "model": config.model, "seed": str(config.seed)}
        if self.is_complete:
            averages = self.evaluation()["averages"]
            rows |= {f"accuracy, {name}": f"{100 * value:.1f} %" for name, value in averages.items()}
        names = ("config.json", "manifest.json", "metrics.jsonl", "samples", "checkpoints", "evaluation.json")
        return display.folder(self.path, rows, names)

    # --- what is there -------------------------------------------------------------------------------------------

    @property
    def is_complete(self) -> bool:
        return (self.path / "evaluation.json").is_file()

    def config(self) -> Config:
        """The run's configuration. Raises RunError if the directory does not hold a run."""
        try:
            return configs.from_dict(upgraded(json.loads((self.path / "config.json").read_text())))
        except FileNotFoundError:
            raise RunError(f"{self.path} is not a run directory: it has no config.json") from None
        except ConfigError as error:  # (which is a ValueError)
            raise RunError(f"{self.path} cannot be resumed: {error}") from None
        except (ValueError, AttributeError, RecursionError) as error:  # no JSON, no text, no mapping
            raise RunError(f"{self.path}/config.json is damaged: {error}") from None

    def stages(self, config: Config) -> list[tuple[Config, Path]]:
        """The stages of a run of the configuration in order, each a configuration and its directory."""
        stages = config.method.stages(config)
        made = {name: str(self.path / name / "final") for name, _ in stages if name}
        return [(stage.replace(model=made.get(stage.model, stage.model)), self.path / name) for name, stage in stages]

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, without a last one that is only half there."""
        return list(read_lines(self.path / "metrics.jsonl"))

    def evaluation(self) -> dict[str, Any]:
        """The final evaluation. Raises RunError if the run is not complete."""
        if not self.is_complete:
            raise RunError(f"{self.path} is not complete")
        return _read_object(self.path / "evaluation.json")

    def last_row(self) -> dict[str, Any]:
        """The newest whole row of metrics.jsonl, {} if there is none; reads the end of the file only."""
        try:
            with open(self.path / "metrics.jsonl", "rb") as handle:
                handle.seek(max(0, handle.seek(0, os.SEEK_END) - (1 << 16)))
                lines = handle.read().split(b"\n")
        except FileNotFoundError:
            return {}
        for line in reversed(lines):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                return row
        return {}

    # --- writing -------------------------------------------------------------------------------------------------

    @contextmanager
    def locked(self, doing: str = "training") -> Iterator[None]:
        """Holds the directory for this process; the lock ends with it, however it ends. Raises RunError if taken."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            handle = open(self.path / "lock", "a")  # noqa: SIM115
        with handle:
            for attempt in range(10):  # whoever only looks whether the lock is taken holds it for an instant
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if attempt == 9:
                        raise RunError(f"another process is {doing} in {self.path}") from None
                    time.sleep(0.05)
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
            self._drop_leftovers()
            yield

    def _drop_leftovers(self) -> None:
        """Removes what processes that are no more have begun to write."""
        for checkpoint in self.path.rglob(".writing-*"):  # which only the holder of the lock writes
            shutil.rmtree(checkpoint, ignore_errors=True)
        for file in self.path.rglob(".*.tmp"):
            if (match := _ASIDE.fullmatch(file.name)) is None:
                continue
            # whether a process of another machine lives nobody knows; but such a file is there for moments only
            gone = match["host"] == platform.node() and not Path(f"/proc/{match['maker']}").exists()
            with suppress(FileNotFoundError):
                if gone or time.time() - file.stat().st_mtime > LEFTOVER_S:
                    file.unlink()

    @property
    def is_running(self) -> bool:
        """Whether a process is training in the directory."""
        try:
            with open(self.path / "lock") as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def pid(self) -> int | None:
        """The process that is training in the directory, or None."""
        return int((self.path / "lock").read_text() or 0) or None if self.is_running else None

    def start(self, config: Config, manifest: dict[str, Any]) -> None:
        """Writes the configuration and the manifest, or checks that the ones there are of the same configuration."""
        if (self.path / "config.json").exists():
            known = self.config()
            if known != config:
                changed = config.differing(known.to_dict())
                raise RunError(
                    f"{self.path} holds a run with another configuration (it differs in {', '.join(changed)})"
                )
            return
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "manifest.json", manifest)
        write_json(self.path / "config.json", config.to_dict())

    def add_to_manifest(self, **facts: Any) -> None:
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "manifest.json", {**self._manifest(), **facts})

    def _manifest(self) -> dict[str, Any]:
        path = self.path / "manifest.json"
        return _read_object(path) if path.exists() else {}

    def day(self) -> date:
        """The day that the run takes for today, wherever a prompt states it: the one of its manifest, so that a run
        that is resumed on another day gets the prompts that it started with."""
        known = self._manifest()
        return date.fromisoformat(known["day"]) if "day" in known else date.today()

    def append_metrics(self, row: dict[str, Any]) -> None:
        append_line(self.path / "metrics.jsonl", row)

    def keep_metrics_until(self, step: int) -> None:
        """Drops the rows after a step, which are about to be computed again, and a half-written last one.

        Raises RunError if rows before it are missing.
        """
        rows = [row for row in self.metrics() if isinstance(row.get("step"), int) and row["step"] <= step]
        if step > 0 and [row["step"] for row in rows if row["step"]] != list(range(1, step + 1)):
            raise RunError(f"{self.path}/metrics.jsonl is damaged: it lacks rows before step {step}")
        replace_lines(self.path / "metrics.jsonl", rows)

    def write_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        with writing(self.path):
            (self.path / "samples").mkdir(exist_ok=True)
        write_json(self.path / "samples" / f"step-{step:06d}.json", samples)

    def complete(self, evaluation: dict[str, Any]) -> None:
        write_json(self.path / "evaluation.json", evaluation)

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def checkpoint_path(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def save_checkpoint(self, step: int, write: Callable[[Path, int], None], keep: int) -> None:
        """Has `write` fill a folder aside, lists its files' hashes, renames it into place and drops old ones."""
        final = self.checkpoint_path(step)
        aside = final.with_name(f".writing-{final.name}")
        shutil.rmtree(aside, ignore_errors=True)
        with writing(final):
            try:
                aside.mkdir(parents=True)
                write(aside, step)
                seal(aside, step=step)
                shutil.rmtree(final, ignore_errors=True)  # only there if it was found damaged
                os.rename(aside, final)
            finally:
                shutil.rmtree(aside, ignore_errors=True)  # a disk that is full has this room again
            _sync(final.parent)
            if (self.path / "metrics.jsonl").exists():
                _sync(self.path / "metrics.jsonl")  # a checkpoint must not outlive the rows before it
        # Newer ones were found damaged when this run was resumed before them.
        older = sorted(path for path in final.parent.glob("step-*") if path.name < final.name)
        newer = [path for path in final.parent.glob("step-*") if path.name > final.name]
        for path in [*older[: len(older) - keep + 1], *newer]:
            shutil.rmtree(path)

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """The newest undamaged checkpoint, or None. A damaged one is logged and passed over."""
        for path in sorted((self.path / "checkpoints").glob("step-*"), reverse=True):
            problem = damage(path)
            if problem is None:
                return int(path.name.removeprefix("step-")), path
            log.warning("checkpoint %s is damaged (%s); the one before it is used", path, problem)
        return None

    def link_final(self, step: int) -> None:
        """Points `final` at the step's checkpoint."""
        aside = self.path / ".final"
        aside.unlink(missing_ok=True)
        aside.symlink_to(self.checkpoint_path(step).relative_to(self.path))
        os.replace(aside, self.path / "final")


SEAL = "checkpoint.json"
LEFTOVER_S = 3600.0
_ASIDE = re.compile(r"\..+?\.jsonl?\.(?P<host>.+)\.(?P<maker>\d+)\.tmp")  # as _replace names it


def seal(folder: Path, **facts: Any) -> None:
    """Writes the list of a folder's files with their hashes, by which `damage` knows whether they are still whole."""
    files = {str(f.relative_to(folder)): file_hash(f) for f in sorted(folder.rglob("*")) if f.is_file()}
    write_json(folder / SEAL, {**facts, "sha256": files})
    for name in [*files, SEAL]:
        _sync(folder / name)


def damage(folder: Path, suffix: str = "") -> str | None:
    """What is wrong with a sealed folder, or None if every file (whose name has that suffix) is there with the hash it
    was written with."""
    try:
        files = json.loads((folder / SEAL).read_text())["sha256"]
        for name, digest in files.items():
            if name.endswith(suffix) and file_hash(folder / name) != digest:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def damaged_weights(model: str | None) -> str | None:
    """What is wrong with the weights of a model that is a sealed folder, such as the checkpoint of an earlier stage;
    None for any other. (Tokenizer and template of one may have been changed on purpose.)"""
    sealed = model and (Path(model) / SEAL).is_file()
    return damage(Path(str(model)), ".safetensors") if sealed else None


def seconds_per_phase(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The sums of the time/... columns of a run's metrics."""
    phases = sorted({name for row in rows for name in row if name.startswith("time/")})
    return {name.removeprefix("time/"): round(sum(row.get(name, 0.0) for row in rows), 3) for name in phases}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, none if there is no file. A line that is only half there is passed over."""
    try:
        handle = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115
    except FileNotFoundError:
        return
    with handle:
        for number, line in enumerate(handle, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield row
            else:
                log.warning("%s: line %d is damaged and passed over", path, number)


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Appends an object to a JSON-lines file. After a line that a killed process left half-written, on a new one."""
    text = json.dumps(row) + "\n"
    with writing(path), open(path, "ab+") as handle:
        if handle.seek(0, os.SEEK_END):
            handle.seek(-1, os.SEEK_END)
            text = text if handle.read(1) == b"\n" else f"\n{text}"
        handle.write(text.encode())


def replace_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a JSON-lines file so that the old or the new one is there at every moment."""
    _replace(path, "".join(json.dumps(row) + "\n" for row in rows))


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises RunError if the file holds none."""
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise RunError(f"{path} is damaged: it holds no object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is whole at every moment."""
    _replace(path, json.dumps(value, indent=1))


def _replace(path: Path, text: str) -> None:
    # several machines may start a run at once
    aside = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    with writing(path):
        try:
            aside.write_text(text)
            _sync(aside)
            os.replace(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What is written here, when the disk is full or does not let it, ends in one RunError; whatever is raised
    otherwise stays as it is. Libraries say it in their own ways: safetensors, and torch's archives."""
    try:
        yield
    except OSError as error:
        raise RunError(_cannot(path, error.strerror or str(error))) from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise RunError(_cannot(path, str(error).splitlines()[0])) from error
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
            raise RunError(_cannot(path, "the disk is full, or takes no more of this file")) from error
        raise


def _cannot(path: Path, reason: str) -> str:
    return f"cannot write {path}: {reason}. What was written before is whole: resume when there is room"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def make_manifest(seed: int, **facts: Any) -> dict[str, Any]:
    """What a reader of a result needs to know of how it came about."""
    from importlib import metadata

    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "luffy": _code_version(),
        "day": date.today().isoformat(),
        "python": sys.version.split()[0],
        "packages": versions,
        "machine": {
            "platform": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "seed": seed,
        **facts,
    }


def _code_version() -> str:
    from . import __version__

    source = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "-C", source, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return __version__
    return f"{__version__}+{commit}"
