"""Cells as markdown tables, and documents whose tables are filled from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cells import ROOT

DOCUMENTS = ("docs/benchmarks.md", "README.md", "docs/host-tests.md", "docs/zoo.md")
MARKED = re.compile(r"^(<!-- table: ([\w-]+) ([\w-]+) -->\n).*?^(<!-- end -->)$", re.DOTALL | re.MULTILINE)
Rows = list[dict[str, Any]]


def markdown(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def listing(rows: Rows, columns: dict[str, str | Callable[[dict[str, Any]], Any]]) -> str:
    """One line per row; a column is a format string with the row's fields, or a function of the row."""

    def text(row: dict[str, Any], column: str | Callable[[dict[str, Any]], Any]) -> Any:
        return column.format(**row) if isinstance(column, str) else column(row)

    return markdown(list(columns), [[text(r, c) for c in columns.values()] for r in rows])


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation; one value alone, nothing for none."""
    if not values:
        return ""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def chosen(rows: Rows, **values: Any) -> Rows:
    """Rows with these values; a list is one of several."""
    return [r for r in rows if all(r.get(k) in v if isinstance(v, list) else r.get(k) == v for k, v in values.items())]


def distinct(rows: Rows, *fields: str, order: Sequence[Any] = ()) -> list[Any]:
    """Values of a field, or tuples of several, as they come or in an order given."""
    found = list(dict.fromkeys(tuple(r[f] for f in fields) if len(fields) > 1 else r[fields[0]] for r in rows))
    return sorted(found, key=lambda v: order.index(v) if v in order else len(order)) if order else found


def pivot(
    rows: Rows,
    down: str | Sequence[str],
    across: str,
    *,
    value: str = "top1",
    digits: int = 1,
    header: Sequence[str] | None = None,
    columns: Sequence[Any] | None = None,
    order: Sequence[Any] = (),
    cell: Callable[[Sequence[float]], str] | None = None,
    label: Callable[[Any], Sequence[Any]] = lambda key: key if isinstance(key, tuple) else (key,),
) -> str:
    """Mean ± standard deviation of ``value``: one line per value of ``down``, one column per value of ``across``.

    Args:
        rows: key and values of every cell.
        down: a field, or several.
        across: a field.
        value: what is averaged.
        digits: after the point.
        header: of the whole table; default: ``down`` and the columns.
        columns: values of ``across``; default: all, sorted.
        order: values of ``down`` that come first.
        cell: text for the values of a cell.
        label: what begins a line.
    """
    down = [down] if isinstance(down, str) else list(down)
    columns = sorted({r[across] for r in rows}) if columns is None else columns
    lines = []
    for key in distinct(rows, *down, order=order):
        mine = chosen(rows, **dict(zip(down, key if len(down) > 1 else (key,), strict=True)))
        texts = [[r[value] for r in chosen(mine, **{across: c})] for c in columns]
        lines.append([*label(key), *(cell(t) if cell else spread(t, digits) for t in texts)])
    return markdown(header or [*down, *columns], lines)


def regenerated(text: str, table: Callable[[str, str], str]) -> str:
    """A document with what is between its markers made anew; ``table(experiment, name)`` gives it."""
    opened, whole = len(re.findall(r"^<!-- table:", text, re.MULTILINE)), len(MARKED.findall(text))
    if not opened == whole == len(re.findall(r"^<!-- end -->$", text, re.MULTILINE)):
        raise SystemExit(
            f"{opened} tables are opened and {whole} closed: every <!-- table: A B --> needs an <!-- end -->"
        )
    return MARKED.sub(lambda m: f"{m[1]}\n{table(m[2], m[3])}\n\n{m[4]}", text)


def fill(table: Callable[[str, str], str], root: Path = ROOT) -> list[str]:
    """Fill the tables of all documents; returns those that changed."""
    changed = []
    for name in DOCUMENTS:
        text = (root / name).read_text(encoding="utf-8")
        if (new := regenerated(text, table)) != text:
            (root / name).write_text(new, encoding="utf-8")
            changed.append(name)
    return changed
