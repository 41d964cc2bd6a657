"""Readers of user data: every row comes with its place, so that a complaint can name file and line.

A reader passes on what the file says: it drops no row, guesses no type, and refuses what it cannot read in full.
Code that a dataset of the hub may carry is never run.
"""

import codecs
import csv
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from softprompt.errors import UserError
from softprompt.packages import extract, fetch, writing_below
from softprompt.spec import HubData, PackageData

Row = dict[str, object]
Placed = tuple[str, Row]
"""A row and its place, as in `reviews.csv:17`."""
Format = Literal["csv", "tsv", "jsonl", "parquet"]


def read_file(path: Path, *, format: Format | None = None, columns: tuple[str, ...] | None = None) -> Iterator[Placed]:
    """The rows of one CSV, TSV, JSONL or Parquet file, with `<file name>:<line>` (Parquet: `:<row>`, from 1).

    CSV may quote its cells. TSV knows no quoting: a quote is a letter like any other.

    Args:
        path: The file, in UTF-8 where it is text; a byte order mark is skipped.
        format: How it is written; its suffix tells by default.
        columns: Column names of a CSV or TSV file without a header row.

    Raises:
        UserError: The file is missing, empty, not UTF-8, or broken at the line named.
    """
    format = format or format_of(path)
    require_readable(path)
    if format == "parquet":
        return _read_parquet(path)
    if format == "jsonl":
        return _read_jsonl(path)
    return _read_delimited(path, columns, tabs=format == "tsv")


def read_package(data: PackageData, cache: Path) -> Iterator[Placed]:
    """The rows of a file carried by a package; the package is fetched if need be, and verified."""
    archive = fetch(data.package, data.sha256, cache)
    with writing_below(cache):
        folder = tempfile.TemporaryDirectory(dir=cache, prefix=".rows-")
    with folder as temporary:
        name = data.file.rpartition("!")[2].rpartition("/")[2]
        file = extract(archive, data.file, Path(temporary) / name)
        yield from read_file(file, format=data.format, columns=data.columns)


def read_hub(data: HubData, split: str) -> Iterator[Placed]:
    """The rows of one split of a dataset on the hub, with `<id>/<split>:<row>`."""
    from datasets import load_dataset  # slow to import, and of no use to local files
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(data.id, data.config, revision=data.revision, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{data.id}: split {split} at revision {data.revision} could not be loaded from the hub ({reason[:200]}); "
            "check data.id, data.config, data.revision and the network"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{data.id}/{split}:{number}", dict(row)


def format_of(path: Path) -> Format:
    """The format that a file's suffix tells; UserError where it tells none."""
    suffix = path.suffix.lower().removeprefix(".")
    known: tuple[Format, ...] = get_args(Format)
    for format in known:
        if format == suffix:
            return format
    raise UserError(f"{path}: the suffix tells no format; set data.format to one of {', '.join(known)}")


def require_readable(path: Path) -> None:
    """UserError unless it is a file that can be read and holds something: a pipe would wait, a device never end."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: cannot be read (it is no regular file); correct the path in the experiment's data")
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); correct the path in the experiment's data"
        ) from None
    if empty:
        raise UserError(f"{path}: the file is empty; give a file with rows")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1, and the lines with their ends."""
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            start = len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0
            try:
                yield number, raw[start:].decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path.name}:{number}: not UTF-8 at byte {offset + start + error.start} of the file "
                    f"(0x{raw[start + error.start]:02x}); save the file as UTF-8"
                ) from None
            offset += len(raw)


def _read_delimited(path: Path, columns: tuple[str, ...] | None, *, tabs: bool) -> Iterator[Placed]:
    text = (line for _, line in _lines(path))
    if tabs:
        reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        reader = csv.reader(text, strict=True)
    header = list(columns) if columns else None
    for line, cells in _records(reader, path):
        where = f"{path.name}:{line}"
        if header is None:
            header = _check_header(cells, where)
        elif len(cells) != len(header):
            raise UserError(
                f"{where}: expected {len(header)} cells ({', '.join(header)}), found {len(cells)}; mend the row"
            )
        else:
            yield where, dict(zip(header, cells, strict=True))
    if header is None:
        raise UserError(f"{path}: no header row found; give a file with rows")


def _records(reader: Iterator[list[str]], path: Path) -> Iterator[tuple[int, list[str]]]:
    """Records that are not blank, each with the line it starts on: a quoted cell may span lines."""
    line = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path.name}:{line}: not a readable row ({error}); mend it, or use JSONL") from None
        if cells:
            yield line, cells
        line = reader.line_num + 1  # type: ignore[attr-defined]


def _check_header(names: list[str], where: str) -> list[str]:
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UserError(
            f"{where}: the header names {', '.join(map(repr, twice))} twice; give each column a name of its own"
        )
    if not all(n.strip() for n in names):
        raise UserError(f"{where}: the header has a column without a name; name it, or set data.columns")
    return names


def _read_jsonl(path: Path) -> Iterator[Placed]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON ({error}); each line must hold one JSON object") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: each line must hold one JSON object, found {type(row).__name__}")
        yield where, row


def _read_parquet(path: Path) -> Iterator[Placed]:
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            _check_header(names, path.name)
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}:{number}", row
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable Parquet file ({reason[:200]}); write it anew") from None
