"""Answers for texts or for the rows of a file, written as CSV, all or nothing."""

import csv
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TextIO

from softprompt.data import as_text, read_file
from softprompt.errors import UserError
from softprompt.home import owns_tracking, require_tracking, tracking_file
from softprompt.packages import writing_below
from softprompt.prediction import Predictor, Writer, open_prompt
from softprompt.prompt import SoftPrompt
from softprompt.registry import champions, load_registered

_CHUNK = 512
"""Rows answered together; memory does not grow with the file."""

Row = dict[str, str]


def choose_prompt(folder: Path | None, model: str | None, version: str) -> SoftPrompt:
    """The prompt that the options name; without a name the one champion that there is."""
    if folder is not None:
        return SoftPrompt.load(folder)
    if owns_tracking() and not tracking_file().exists():  # MLflow would make it
        raise UserError(f"{tracking_file()}: there is no registered prompt yet; run a sweep first")
    require_tracking()
    if model is None:
        names = champions()
        if len(names) != 1:
            found = "there are " + ", ".join(names) if names else "there is none yet; run a sweep first"
            raise UserError(f"--model: name the registered prompt to use, {found}")
        model = names[0]
    return load_registered(model, version)


def require_place(out: Path | None) -> None:
    """Before anything is answered: whether the answers can have their file."""
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} is not there; make it first")
    if out is not None and out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file")


def predict_texts(prompt: SoftPrompt, texts: list[str], out: Path | None, device: str) -> None:
    """Answer texts; the prompt's template must name a single column."""
    predictor = open_prompt(prompt, device=device)
    if len(predictor.fields) != 1:
        raise UserError(
            f"this prompt reads the columns {', '.join(predictor.fields)}; give rows with --file instead of texts"
        )
    _write(predictor, ({predictor.fields[0]: text} for text in texts), out)


def predict_file(prompt: SoftPrompt, file: Path, out: Path | None, device: str) -> None:
    """Answer the rows of a CSV, TSV, JSONL or Parquet file."""
    placed = read_file(file)
    fields = Predictor.fields_of(prompt)
    rows = (_pick(row, fields, where) for where, row in placed)
    first = next(rows, None)  # a wrong column is told before the model is loaded
    if first is None:
        raise UserError(f"{file}: holds no rows to answer")
    predictor = open_prompt(prompt, device=device)
    _write(predictor, _chain(first, rows), out)


def _pick(row: dict[str, object], fields: list[str], where: str) -> Row:
    for name in fields:
        if row.get(name) is None:
            raise UserError(f"{where}: column {name!r} is missing, which the prompt reads; found {', '.join(row)}")
    return {name: as_text(row[name], where, name) for name in fields}


def _chain(first: Row, rest: Iterable[Row]) -> Iterator[Row]:
    yield first
    yield from rest


def _write(predictor: Predictor | Writer, rows: Iterator[Row], out: Path | None) -> None:
    with _output(out) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*predictor.fields, *predictor.columns])
        while chunk := list(islice(rows, _CHUNK)):
            for row, cells in zip(chunk, predictor.cells(chunk), strict=True):
                writer.writerow([*(row[field] for field in predictor.fields), *cells])


@contextmanager
def _output(out: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears when it is complete."""
    if out is None:
        yield sys.stdout
        return
    with (
        writing_below(out.parent, "name another file with --out"),
        tempfile.TemporaryDirectory(dir=out.parent) as folder,
    ):
        draft = Path(folder) / out.name
        with draft.open("w", encoding="utf-8", newline="") as stream:
            yield stream
        os.replace(draft, out)
