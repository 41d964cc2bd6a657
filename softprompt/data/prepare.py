"""From an experiment's data to three splits on disk, the same bytes for the same experiment.

The splits are what every score rests on, so their content has a digest that travels with each result. A row that
cannot be understood stops the preparation; a row that is left out for a reason is counted under that reason. No
row ever stands in two splits.
"""

import contextlib
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import parquet

from softprompt.data.carve import Example, Splits, carving_rank, divide
from softprompt.data.rows import Placed, read_file, read_hub, read_package, require_readable
from softprompt.errors import UserError
from softprompt.packages import file_sha256, move_in, writing_below
from softprompt.spec import ExperimentSpec, FileData, FreeText, HubData, PackageData, RatingLabels, fingerprint

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test")
_LAYOUT = 2
"""Part of the key: raised whenever the same data would be prepared into other bytes."""


@dataclass(frozen=True)
class PreparedData:
    """The splits of one experiment on disk, as a record that processes can hand to each other."""

    path: Path
    """Folder that holds `train.parquet`, `validation.parquet`, `test.parquet` and `prepared.json`."""
    digest: str
    """SHA-256 over the rows of all splits, in order."""
    source: str
    """Where the rows come from, for a person."""
    sizes: dict[str, int]
    """Rows of each split."""
    labels: dict[str, dict[str, int]]
    """For each split, the rows of each label; free text has none."""
    left_out: dict[str, int]
    """Rows left out, by reason."""
    test_bound: str | None
    """The last place of a test row in the order of carving; None where the data names its test split."""

    def split(self, name: str) -> "Dataset":
        """One split: every template field, and `label`, which may be a free text, as columns of strings."""
        from datasets import Dataset  # takes seconds, and only those who train or score need it
        from datasets.table import InMemoryTable

        # A given fingerprint spares the hashing of all rows by dill, which prints bytecode into a flow's log.
        table = InMemoryTable(parquet.read_table(self.path / f"{name}.parquet"))
        return Dataset(table, fingerprint=f"{self.digest[:32]}-{name}")

    def as_json(self) -> dict[str, Any]:
        """The record as plain values."""
        return asdict(self) | {"path": str(self.path)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "PreparedData":
        """The record back from `as_json`."""
        return cls(**{**record, "path": Path(record["path"])})


def prepare(experiment: ExperimentSpec, cache: Path) -> PreparedData:
    """The experiment's splits, from `cache/data/<key>` where they lie there unharmed, else made anew.

    Raises:
        UserError: A row, column, label or split is not as the experiment says; file, row and key are named.
    """
    folder = cache / "data" / data_key(experiment)
    with contextlib.suppress(UserError):  # not there yet, or harmed
        return load_prepared(folder)
    pools, left_out = _read_pools(experiment, cache)
    splits = divide(pools, experiment, left_out)
    prepared = PreparedData(
        path=folder,
        digest=_digest(experiment.fields, splits),
        source=_source(experiment),
        sizes={name: len(splits[name]) for name in SPLITS},
        labels={name: _count_labels(splits[name], experiment.labels.words) for name in SPLITS},
        left_out=dict(left_out),
        test_bound=None if "test" in pools else max(carving_rank(e, experiment.seed) for e in splits["test"]),
    )
    return _store(prepared, experiment.fields, splits)


def load_prepared(path: Path) -> PreparedData:
    """Read a folder that `prepare` wrote, and verify its rows against its digest."""
    try:
        record = json.loads((path / "prepared.json").read_text(encoding="utf-8"))
        tables = {name: parquet.read_table(path / f"{name}.parquet") for name in SPLITS}
        prepared = PreparedData.from_json(record | {"path": path})
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{path}: holds no prepared data ({error}); prepare the experiment's data anew") from None
    fields = [n for n in tables["train"].column_names if n != "label"]
    found = _digest(fields, {name: _examples(table, fields) for name, table in tables.items()})
    if found != prepared.digest:
        raise UserError(f"{path}: expected rows with digest {prepared.digest}, found {found}; delete this folder")
    return prepared


def find_prepared(digest: str, cache: Path) -> PreparedData | None:
    """Prepared data of a digest, if they lie in the cache unharmed."""
    for file in sorted((cache / "data").glob("*/prepared.json")):
        with contextlib.suppress(UserError, OSError, ValueError, AttributeError):  # another process may remove it
            if json.loads(file.read_text(encoding="utf-8")).get("digest") == digest:
                return load_prepared(file.parent)
    return None


def data_key(experiment: ExperimentSpec) -> str:
    """What decides the prepared data, as a fingerprint: data, fields, labels, splits, seed and the files' bytes."""
    files = {}
    if isinstance(experiment.data, FileData):
        for path in _files(experiment.data).values():
            require_readable(path)
            files[str(path)] = file_sha256(path)
    parts = experiment.model_dump(mode="json", include={"data", "labels", "splits", "seed"})
    return fingerprint(parts | {"fields": experiment.fields, "files": files, "layout": _LAYOUT})


def _files(data: FileData) -> dict[str, Path]:
    named = {"train": data.path or data.train, "validation": data.validation, "test": data.test}
    return {split: Path(path) for split, path in named.items() if path}


def _sources(experiment: ExperimentSpec, cache: Path) -> dict[str, Iterator[Placed]]:
    """The rows of each split that the data names; `train` is also what the others are carved from."""
    data = experiment.data
    if isinstance(data, PackageData):
        return {"train": read_package(data, cache)}
    if isinstance(data, HubData):
        named = {"train": data.train, "validation": data.validation, "test": data.test}
        return {split: read_hub(data, name) for split, name in named.items() if name}
    return {s: read_file(p, format=data.format, columns=data.columns) for s, p in _files(data).items()}


def _source(experiment: ExperimentSpec) -> str:
    data = experiment.data
    if isinstance(data, PackageData):
        return f"{data.package}: {data.file}"
    if isinstance(data, HubData):
        return f"{data.id}{f'/{data.config}' if data.config else ''}@{data.revision}"
    return ", ".join(str(path) for path in _files(data).values())


def _read_pools(experiment: ExperimentSpec, cache: Path) -> tuple[Splits, Counter[str]]:
    """The examples of each named split, and how many rows were left out on the way."""
    _check_fields(experiment)
    left_out: Counter[str] = Counter()
    pools = {}
    for split, placed in _sources(experiment, cache).items():
        pools[split] = list(_read_examples(placed, experiment, left_out))
    return pools, left_out


def _check_fields(experiment: ExperimentSpec) -> None:
    if experiment.labels.field in experiment.fields:
        raise UserError(
            f"template: {{{experiment.labels.field}}} is the column that the labels are read from, so the input would "
            "give the answer away; take it out of the template"
        )
    if "label" in experiment.fields:
        raise UserError("template: the column name 'label' is taken by the prepared labels; rename it in the data")


def _read_examples(placed: Iterable[Placed], experiment: ExperimentSpec, left_out: Counter[str]) -> Iterator[Example]:
    fields, labels = experiment.fields, experiment.labels
    needed = [*fields, labels.field]
    for where, row in placed:
        for name in needed:
            if name not in row:
                raise UserError(_missing(where, name, list(row), experiment))
        inputs = tuple(as_text(row[name], where, name) for name in fields)
        label = _label(as_text(row[labels.field], where, labels.field), where, experiment)
        if not any(value.strip() for value in inputs):
            left_out["empty input"] += 1
        elif label is None:
            left_out["no label"] += 1
        else:
            yield Example(inputs, label)


def _missing(where: str, name: str, found: list[str], experiment: ExperimentSpec) -> str:
    key = "template" if name in experiment.fields else "labels.field"
    hint = "correct the name"
    if getattr(experiment.data, "columns", None) is None and not isinstance(experiment.data, HubData):
        hint += ", or set data.columns if the file has no header row"
    return f"{where}: no column {name!r}, which {key} names; found {', '.join(map(repr, found))}; {hint}"


def as_text(value: object, where: str, name: str) -> str:
    """A value as text, none as empty; UserError, with place and column, where it is neither text nor number."""
    if value is None:
        return ""
    if isinstance(value, str | int | float | Decimal | date):
        text = str(value)
        if text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text):
            return text
        raise UserError(f"{where}: column {name!r} holds half of a surrogate pair, which is no text; mend the row")
    raise UserError(f"{where}: column {name!r} must hold text or a number, found {type(value).__name__}")


def _label(value: str, where: str, experiment: ExperimentSpec) -> str | None:
    """The label that the value of the label column stands for, or the text itself; None for a rating in no bin."""
    labels = experiment.labels
    if isinstance(labels, FreeText):
        if not value.strip():
            raise UserError(f"{where}: column {labels.field!r} is empty, and there is no text to learn; mend the row")
        return value
    if not isinstance(labels, RatingLabels):
        if value not in labels.words:
            known = ", ".join(map(repr, labels.words))
            raise UserError(f"{where}: unknown label {value!r} in column {labels.field!r}; labels.words has {known}")
        return value
    try:
        rating = float(value)
    except ValueError:
        raise UserError(f"{where}: column {labels.field!r} must hold a number, found {value!r}; mend the row") from None
    return next((b.label for b in labels.bins if b.holds(rating)), None)


def _count_labels(examples: list[Example], words: Mapping[str, str]) -> dict[str, int]:
    counts = Counter(example.label for example in examples)
    return {label: counts[label] for label in words}


def _digest(fields: list[str], splits: Mapping[str, list[Example]]) -> str:
    """SHA-256 over one canonical JSON line for each row: its split, fields and label."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for example in splits[split]:
            line = {"split": split, "fields": dict(zip(fields, example.inputs, strict=True)), "label": example.label}
            digest.update(json.dumps(line, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def _examples(table: pa.Table, fields: list[str]) -> list[Example]:
    columns = [table.column(name).to_pylist() for name in [*fields, "label"]]
    return [Example(tuple(inputs), label) for *inputs, label in zip(*columns, strict=True)]


def _store(prepared: PreparedData, fields: list[str], splits: Splits) -> PreparedData:
    """Write everything aside, and move it in at once."""
    folder = prepared.path
    with writing_below(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".prepare-") as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            for name in SPLITS:
                parquet.write_table(_table(splits[name], fields), made / f"{name}.parquet")
            record = prepared.as_json()
            del record["path"]  # the cache may be moved
            (made / "prepared.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            move_in(made, folder, lambda: _is_sound(folder))
    return prepared


def _is_sound(folder: Path) -> bool:
    with contextlib.suppress(UserError):
        load_prepared(folder)
        return True
    return False


def _table(examples: list[Example], fields: list[str]) -> pa.Table:
    columns = {name: [e.inputs[n] for e in examples] for n, name in enumerate(fields)}
    columns["label"] = [e.label for e in examples]
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
