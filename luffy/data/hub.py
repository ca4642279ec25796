"""Where models and data sets are found: a folder or file here, or a name on the Hugging Face hub.

A path that does not exist is never asked of the hub, and a hub that cannot be reached is asked once, not retried: what
is in the cache is then used, and what is not is one clear error.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from ..runs import damage, seal, writing

log = logging.getLogger(__name__)

PATIENCE_S = 3.0  # for the hub's first sign of life
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")


class NotFoundError(ValueError):
    """There is no such folder, and the hub does not have the name or cannot be reached."""


def cache_folder() -> Path:
    """Where what was made once is kept: $LUFFY_CACHE, else ~/.cache/luffy."""
    return Path(os.environ.get("LUFFY_CACHE") or Path.home() / ".cache" / "luffy")


@contextmanager
def held_in_cache(kind: str, name: str) -> Iterator[Path]:
    """A place in the cache folder, for this process alone: several may want to make the same at once."""
    folder = cache_folder() / kind
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder / name


def made_in_cache(kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """A folder in the cache that `make` has filled, now or before, and whose files are as they were then. One that has
    been damaged is made again.

    Raises RunError if it cannot be written.
    """
    folder = cache_folder() / kind / name
    if folder.is_dir() and _damage(folder, _state(folder)) is None:
        return folder
    with writing(folder), held_in_cache(kind, name):
        problem = _damage(folder, _state(folder)) if folder.is_dir() else None
        if problem:
            log.warning("%s is damaged (%s); it is made again", folder, problem)
            shutil.rmtree(folder)
        for left in folder.parent.glob(f".{name}-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        if not folder.is_dir():
            aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}-"))
            try:
                make(aside)
                seal(aside)
                aside.chmod(0o755)  # mkdtemp makes folders that only their owner can read
                os.rename(aside, folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return folder


def _state(folder: Path) -> tuple[tuple[Path, int, int], ...]:
    """The files of a folder, with their sizes and times."""
    facts = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return tuple((path, fact.st_size, fact.st_mtime_ns) for path, fact in facts)


@cache
def _damage(folder: Path, state: tuple[tuple[Path, int, int], ...]) -> str | None:
    """`damage` of a folder in this state: a process that asks for a model's settings, tokenizer and weights reads all
    of its files once."""
    return damage(folder)


def expanded(source: str | Path) -> str:
    """The source with `~` as the home directory."""
    return os.path.expanduser(str(source))


def locate(source: str | Path) -> str:
    """The source as transformers and datasets take it: an existing path, or a name to ask the hub for.

    Raises NotFoundError for a path that is not there. If the hub cannot be reached, this process works offline from
    now on.
    """
    name = expanded(source)
    if Path(name).exists():
        return name
    if name.startswith((".", "/")) or not _NAME.fullmatch(name):
        raise NotFoundError(f"there is no folder {name}{_elsewhere(name)}")
    if not _hub_answers():
        _work_offline()
    return name


def check_model(source: str | Path) -> None:
    """Raises NotFoundError for a model that cannot be loaded because it is nowhere: not a path here, and not in the
    cache of a hub that cannot be reached. Quick, so that it can be asked before anything else is imported."""
    from huggingface_hub import constants, try_to_load_from_cache

    name = locate(source)
    offline = constants.HF_HUB_OFFLINE and not Path(name).exists()
    if offline and not isinstance(try_to_load_from_cache(name, "config.json"), str):
        raise NotFoundError(missing(name, ""))


def missing(source: str | Path, reason: str) -> str:
    """What to say of a hub name that could not be loaded, in one line."""
    name = expanded(source)
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        reason = (
            "the Hugging Face hub cannot be reached (or HF_HUB_OFFLINE is set), and its cache here does not have it"
        )
    return f"{reason}{_elsewhere(name)}"


def _elsewhere(name: str) -> str:
    """A hint at a folder of that name in another place, if there is one."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    if not last.strip("."):
        return ""
    here, home = Path.cwd(), Path.home()
    places = [
        here / last,
        here.parent / last,
        home / last,
        *(base / "models" / last for base in (here, here.parent, home)),
    ]
    places += sorted(path / last for path in here.iterdir() if path.is_dir())
    found = next((place for place in places if place.exists()), None)
    return f"; did you mean {found}?" if found else ""


@cache
def _hub_answers() -> bool:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    import httpx

    try:
        httpx.head(constants.ENDPOINT, timeout=PATIENCE_S)
    except httpx.HTTPError:
        return False
    return True


def _work_offline() -> None:
    """Has every library of this process, and of its children, use its cache alone."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        log.info("the Hugging Face hub cannot be reached: what is not in its cache here is not there")
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
