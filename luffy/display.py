"""How settings, runs and evaluations show themselves in a notebook: a caption over a short table, with links to files.

Objects give their `_repr_html_` to these functions; they need nothing but the object.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any


def table(caption: str, rows: Mapping[str, Any]) -> str:
    """HTML of a table of two columns."""
    return _table(caption, _cells(rows))


def folder(path: Path, rows: Mapping[str, Any], names: Iterable[str]) -> str:
    """A table of what is in a folder, with links to those of its files that exist: relative to the current folder,
    which is how JupyterLab opens them."""
    place = os.path.relpath(path)
    links = ", ".join(
        f'<a href="{html.escape(os.path.join(place, name), quote=True)}">{html.escape(name)}</a>'
        for name in names
        if (path / name).exists()
    )
    return _table(place, _cells(rows) | ({"files": links} if links else {}))


def _cells(rows: Mapping[str, Any]) -> dict[str, str]:
    return {name: html.escape(_short(value)) for name, value in rows.items()}


def _table(caption: str, cells: Mapping[str, str]) -> str:
    """From cells that are HTML already."""
    left = 'style="text-align:left"'
    lines = [f"<tr><th {left}>{html.escape(name)}</th><td {left}>{cell}</td></tr>" for name, cell in cells.items()]
    return f"<table><caption {left}><b>{html.escape(caption)}</b></caption>{''.join(lines)}</table>"


def settings(value: Any) -> str:
    """A settings object: its own fields, and those of its parts that differ from their defaults."""
    return table(getattr(value, "label", "") or type(value).__name__, dict(_rows(value, own=True)))


def _rows(value: Any, own: bool) -> Iterable[tuple[str, Any]]:
    for f in fields(value):
        found = getattr(value, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if is_dataclass(found):
            if label := getattr(found, "label", ""):
                yield f.name, label
            yield from _rows(found, own=False)
        elif own or found != default:
            yield f.name, found


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= 100 else text[:99] + "…"
