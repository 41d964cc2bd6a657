"""Rows to splits on disk, once for the same data.

Prefect's cache alone is not trusted: what it remembers may be gone from the disk, and is then made anew.
"""

from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_table_artifact

from softprompt.data import PreparedData, data_key, load_prepared, prepare
from softprompt.errors import UserError
from softprompt.evaluation import as_markdown
from softprompt.home import cache_home
from softprompt.progress import watcher
from softprompt.spec import ExperimentSpec, fingerprint
from tasks.policy import may_retry


def _key(_: Any, arguments: dict[str, Any]) -> str | None:
    """The identity of the data, and the cache folder that they are in."""
    try:
        parts = {"data": data_key(arguments["experiment"]), "cache": str(cache_home())}
        return f"prepare-data-{fingerprint(parts)}"
    except UserError:
        return None  # said by the task itself


def prepare_data(experiment: ExperimentSpec) -> str:
    """The folder of the splits: from Prefect's cache where what was prepared is still there and whole, else made."""
    try:
        load_prepared(cache_home() / "data" / data_key(experiment))
    except UserError:
        return _prepare_data.with_options(refresh_cache=True)(experiment)
    return _prepare_data(experiment)


@task(
    name="prepare_data",
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=may_retry,
    cache_key_fn=_key,
    persist_result=True,
    result_serializer="json",
    log_prints=True,
)
def _prepare_data(experiment: ExperimentSpec) -> str:
    """Fetch, check and split the rows; returns the folder that holds them."""
    watcher().stage("preparing the data")
    data = prepare(experiment, cache_home())
    create_table_artifact(
        key="data",
        table=[_row(split, data) for split in data.sizes],
        description=f"{as_markdown(data.source)}\n\nDigest `{data.digest}`. Left out: {_left_out(data) or 'nothing'}.",
    )
    return str(data.path)


def describe_data(folder: str) -> str:
    """The prepared data in one line."""
    data = load_prepared(Path(folder))
    sizes = ", ".join(f"{rows:,} {split}" for split, rows in data.sizes.items())
    left_out = _left_out(data)
    return f"data ready: {sizes} rows" + (f"; left out: {left_out}" if left_out else "")


def _row(split: str, data: PreparedData) -> dict[str, str | int]:
    """A split in the table of the page; a label may be called as another column is, or be written in HTML."""
    labels = {f"of {as_markdown(label)}": rows for label, rows in data.labels[split].items()}
    return {"split": split, "rows": data.sizes[split], **labels}


def _left_out(data: PreparedData) -> str:
    return ", ".join(f"{rows:,} {reason}" for reason, rows in data.left_out.items())
