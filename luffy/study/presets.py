"""Configurations in files: for one run, and for the many of an ablation (luffy/study/presets).

A file holds fields of the configuration, and may have `base`, another such file whose values these go over. A file for
one run may have `methods`, a mapping of methods to fields of theirs alone; one for an ablation has lists, `methods`
(default: the nine of the paper) and `seeds`, and may have `variants`: mappings, each of which is run in turn with its
values over the others. `models` is a list of base models that the seeds take in turn, `tuned` a mapping of methods to
fields of theirs, which variants go over.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import yaml

from .. import methods
from ..config import Config, fitting, make_config, read_file
from ..errors import ConfigError

PRESETS = {path.stem: path for path in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}
"""The presets' files by name; a notebook completes the names at `PRESETS["`."""


def _read(path: str | Path, kind: str = "") -> dict[str, Any]:
    """The values of a preset by its name, which begins with the kind in the folder, or of a file of one's own."""
    return read_file(PRESETS.get(f"{kind}{path}", path))


def read_values(path: str | Path, method: str) -> dict[str, Any]:
    """The fields that a file sets for a method: a preset by its name, such as "paper", or a file of one's own.

    Fields that only other methods have are left out. Raises ConfigError.
    """
    values = _read(path)
    base, own = values.pop("base", None), values.pop("methods", None) or {}
    if isinstance(own, list) or {"seeds", "variants", "models", "tuned"} & values.keys():
        raise ConfigError(
            f"{path} is a preset of many runs: papermill notebooks/ablation.ipynb out.ipynb -p preset ..."
        )
    if not isinstance(own, dict) or not all(isinstance(fields, dict) for fields in own.values()):
        raise ConfigError(f"{path}: `methods` is a mapping of methods to fields of theirs, not {own!r}")
    chosen = methods.get(method)
    theirs = [fields for name, fields in own.items() if methods.get(name) is chosen]
    try:
        below = read_values(base, method) if base else {}
    except ConfigError as error:
        raise ConfigError(f"{path}, base: {error}") from error
    merged = {**below, **values, **(theirs[0] if theirs else {})}
    return fitting(merged, chosen)


def read_config(path: str | None, method: str | None) -> Config:
    """The configuration of a file, by name or path, and a method, which the file may name; without a file, the
    method's own (default: luffy)."""
    if path is None:
        return make_config(method or "luffy")
    method = method or read_values(path, "luffy").get("method", "luffy")
    return make_config(**{**read_values(path, method), "method": method})


def load_preset(path: str | Path) -> dict[str, Any]:
    """The values of a preset of an ablation: "smoke", "default", "full", another ablation_* file, or one's own file."""
    values = _read(path, "ablation_")
    base = values.pop("base", None)
    return over(load_preset(base), values) if base else values


def over(preset: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A preset of an ablation with other values over its own: over what is tuned too, method by method, and a model
    over a list of models. Its variants go over them in turn."""
    kept = {name: value for name, value in preset.items() if not ("model" in values and name == "models")}
    merged = {**kept, **values}
    tuned = {
        method: {name: value for name, value in fields.items() if name not in values}
        for method, fields in (preset.get("tuned") or {}).items()
    }
    for method, fields in (values.get("tuned") or {}).items():
        tuned[method] = {**tuned.get(method, {}), **fields}
    return {**merged, "tuned": tuned} if tuned else merged


def root() -> Path:
    """The project's root: the current folder or, for a notebook in notebooks/, the one above."""
    here = Path.cwd()
    return here.parent if here.name == "notebooks" else here


def default_runs_dir(name: str) -> Path:
    """runs/`name` in the project's root."""
    return root() / "runs" / name


def copy_notebooks(folder: Path) -> list[Path]:
    """Copies the notebooks of a checkout, or of an installed wheel, to a folder. Returns the copies.

    Raises ConfigError if one of them is there already, with nothing copied, or if there are none to copy.
    """
    found = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
    if not found:
        installed = importlib.metadata.files("luffy") or []
        found = sorted(Path(str(file.locate())) for file in installed if file.match("share/luffy/notebooks/*.ipynb"))
    if not found:
        raise ConfigError("there are no notebooks beside this installation of luffy")
    known = [path.name for path in found if (folder / path.name).exists()]
    if known:
        raise ConfigError(f"{folder} has {', '.join(known)} already: choose another folder")
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for picture in found[0].parent.glob("pictures/*.png"):
        shutil.copy(picture, folder / "pictures")
    return [Path(shutil.copy(path, folder)) for path in found]


def as_value(parameter: Any) -> Any:
    """A notebook parameter that may have come as text, because `papermill -p` hands over lists so: "[0, 1, 2]"."""
    return yaml.safe_load(parameter) if isinstance(parameter, str) else parameter
