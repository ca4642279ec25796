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


def table(caption: str, rows: Mapping[str, Any], files: Iterable[Path] = ()) -> str:
    """HTML of a table of two columns, with links to those of the files that exist (relative to the current folder,
    which is how JupyterLab opens them)."""
    lines = [
        f'<tr><th style="text-align:left">{html.escape(name)}</th>'
        f'<td style="text-align:left">{html.escape(_short(value))}</td></tr>'
        for name, value in rows.items()
    ]
    links = ", ".join(
        f'<a href="{html.escape(place(path), quote=True)}">{html.escape(path.name)}</a>'
        for path in files
        if path.exists()
    )
    if links:
        lines.append(f'<tr><th style="text-align:left">files</th><td style="text-align:left">{links}</td></tr>')
    return f'<table><caption style="text-align:left"><b>{html.escape(caption)}</b></caption>{"".join(lines)}</table>'


def place(path: Path) -> str:
    """A path as seen from the current folder."""
    return os.path.relpath(path)


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
