"""Fresh data and the champion: whether there is anything new, what has drifted, and where a new search starts from.

Nothing here trains, and nothing is recorded.
"""

from typing import Any

from mlflow import MlflowClient
from pydantic import BaseModel, ConfigDict, ValidationError

from softprompt.comparison import measure_prompt
from softprompt.data import SPLITS, PreparedData, find_prepared
from softprompt.drift import Check, Drift, Recorded, compare_labels, compare_lengths, compare_scores
from softprompt.earlier import best_settings, last_retuned
from softprompt.errors import UserError
from softprompt.exposure import OTHER_SPLITS, may_have_seen_test
from softprompt.home import cache_home, owns_tracking, require_tracking, tracking_file, tracking_uri
from softprompt.prompt import SoftPrompt
from softprompt.registry import champion_version, load_registered
from softprompt.sources import Source, require_source
from softprompt.spec import Choices, ExperimentSpec, FloatRange, SearchSpec
from softprompt.summary import Summary, summarize_rows
from softprompt.tracking import TEST
from softprompt.workbench import Workbench

EARLIER = 3
"""How many settings of earlier trials a retune tries first, unless it is told otherwise."""
_SMALLER = 3
"""By how much the second trial from the champion is slower than the one that it was trained at."""

Rows = list[dict[str, str]]


class News(BaseModel):
    """What a retune begins with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    champion: int | None
    """Version of the champion; None where there is none."""
    nothing_new: str
    """Why there is nothing to do, as a sentence; empty where there is."""


class Start(BaseModel):
    """The search that a retune makes, and what it starts from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: ExperimentSpec
    told: str
    """What it starts from, for a person."""


def find_news(experiment: ExperimentSpec, data: PreparedData) -> News:
    """Whether the data are other rows than those of the champion, and than those of the last retune."""
    require_tracking()
    made = not owns_tracking() or tracking_file().exists()  # MLflow would make it
    version = champion_version(experiment.name) if made else None
    if version is None:
        return News(champion=None, nothing_new="")
    if _dataset(load_registered(experiment.name, str(version))).get("digest") == data.digest:
        why = f"the rows are those of champion v{version}"
    elif last_retuned(experiment.name) == data.digest:
        why = "the rows are those of the last retune"
    else:
        return News(champion=version, nothing_new="")
    return News(champion=version, nothing_new=f"nothing new: {why} (digest {data.digest[:12]}), so nothing is searched")


def tell_drift(bench: Workbench, version: int) -> Drift:
    """The rows of now beside those that a version was made on, and its score on them beside its recorded one."""
    prompt = load_registered(bench.experiment.name, str(version))
    old = _old_rows(bench, prompt)
    if old is None:
        return _tell_from_memory(bench, prompt, version)
    now = [row for split in SPLITS for row in bench.data.split(split)]
    known, present = ({_key(bench, row) for row in rows} for rows in (old, now))
    new = [row for row in now if _key(bench, row) not in known]
    gone = len(known - present)
    # A row with another label is a new row, and its input has been seen all the same.
    seen = {_inputs(bench, row) for row in old}
    test = [n for n, row in enumerate(bench.data.split("test")) if _inputs(bench, row) not in seen]
    rows = _compare_rows(summarize_rows(bench, old), summarize_rows(bench, new))
    return Drift(
        champion=version,
        compared=f"{len(new):,} new rows are compared with the {len(old):,} of v{version}, of which {gone:,} are gone",
        new_rows=len(new),
        gone_rows=gone,
        checks=(*rows, _compare_scores(bench, prompt, version, test)),
    )


def _tell_from_memory(bench: Workbench, prompt: SoftPrompt, version: int) -> Drift:
    """The same from what the prompt remembers of its rows, where they themselves are not there any more."""
    rows = _compare_rows(_recorded_summary(bench, prompt), bench.summary)
    return Drift(
        champion=version,
        compared=f"All {bench.summary.rows:,} rows of now are compared with what v{version} tells of its own: those "
        "are not in the cache, and a change in a part of the rows shows less",
        new_rows=None,
        gone_rows=None,
        checks=(*rows, _compare_scores(bench, prompt, version, None)),
    )


def warm_start(bench: Workbench, version: int, *, earlier: int) -> Start:
    """The experiment's search, with a version of its registered model as an initialization and to begin with.

    Then come the best settings of the experiment's earlier trials, then its own starting points. Where no prompt can
    start from that version, its space is the experiment's own.

    Args:
        bench: the experiment on the data of now.
        version: the champion's.
        earlier: how many of the earlier trials' settings are tried first.
    """
    experiment = bench.experiment
    prompt = load_registered(experiment.name, str(version))
    search = experiment.search.model_dump(mode="json")
    own, points = search["start"], []
    try:
        require_source(bench, Source(prompt, experiment.name, version))
    except UserError as error:
        told = f"a cold start, not from champion v{version}: {error}"
    else:
        told = f"a warm start from champion v{version}"
        kinds = [kind for kind in search["initialization"] if kind["kind"] != "prompt"]
        search["initialization"] = [*kinds, {"kind": "prompt", "source": f"models:/{experiment.name}/{version}"}]
        points = _from_champion(experiment.search, prompt)
    points += best_settings(experiment, fits=lambda point: _fits(search, point), limit=earlier)
    points = [point for n, point in enumerate(points) if _fits(search, point) and point not in points[:n]]
    kept = [point for point in own if not any(_is_one_of(point, tried) for tried in points)]
    tree = experiment.model_dump(mode="json") | {"search": search | {"start": [*points, *kept]}}
    return Start(
        experiment=ExperimentSpec.model_validate(tree),
        told=f"{told}; {len(points)} settings are tried first" if points else told,
    )


def _from_champion(search: SearchSpec, prompt: SoftPrompt) -> list[dict[str, Any]]:
    rate = prompt.provenance["params"]["learning_rate"]
    rates = [rate, *_below(search.learning_rate, rate)]
    method = "prompt_tuning" if "prompt_tuning" in search.methods else search.methods[0]
    fixed = {"length": prompt.length, "initialization": "prompt", "method": method}
    return [fixed | {"learning_rate": value} for value in rates]


def _below(space: Any, rate: float) -> list[float]:
    """A smaller learning rate of the space, if there is one."""
    if isinstance(space, FloatRange):
        return [max(space.low, rate / _SMALLER)] if space.low < rate else []
    smaller = [value for value in space.choices if value < rate] if isinstance(space, Choices) else []
    return [max(smaller)] if smaller else []


def _fits(search: dict[str, Any], point: dict[str, Any]) -> bool:
    try:
        SearchSpec.model_validate(search | {"start": [point]})
    except ValidationError:
        return False
    return True


def _is_one_of(own: dict[str, Any], tried: dict[str, Any]) -> bool:
    """Whether a point that is tried says all that a starting point says; what that one leaves open is null or empty."""
    return all(value in (None, {}) or tried.get(name) == value for name, value in own.items())


def _dataset(prompt: SoftPrompt) -> dict[str, Any]:
    found: dict[str, Any] = prompt.provenance.get("dataset", {})
    return found


def _old_rows(bench: Workbench, prompt: SoftPrompt) -> Rows | None:
    """The rows of a prompt's data, if they are in the cache and this experiment can read them."""
    old = find_prepared(_dataset(prompt).get("digest", ""), cache_home())
    if old is None or set(old.labels["train"]) != set(bench.experiment.labels.words):
        return None
    rows = [row for split in SPLITS for row in old.split(split)]
    return rows if set(bench.experiment.fields) <= set(rows[0]) else None


def _recorded_summary(bench: Workbench, prompt: SoftPrompt) -> Summary | None:
    """What a prompt remembers of its rows, if it read them as this experiment does."""
    same = (
        prompt.tokenizer_sha256 == bench.backbone.tokenizer_sha256
        and prompt.template == bench.experiment.template
        and prompt.max_tokens == bench.experiment.training.max_tokens
    )
    found = _dataset(prompt).get("summary")
    return Summary.model_validate(found) if same and found else None


def _compare_rows(before: Summary | None, now: Summary) -> list[Check]:
    if before is None:
        why = "its rows are not in the cache, and were read with another template, limit or tokenizer"
        return [Check(key="labels" if now.labels else "texts", subject="rows", untested=why)]
    target = (
        compare_labels(before.labels, now.labels)
        if now.labels
        else compare_lengths("texts", "length of the texts", before.texts, now.texts)
    )
    return [target, compare_lengths("inputs", "length of the inputs", before.inputs, now.inputs)]


def _compare_scores(bench: Workbench, prompt: SoftPrompt, version: int, rows: list[int] | None) -> Check:
    """The champion on the test rows that are new, or on all of them where which is not known and it has seen none."""
    objective = bench.experiment.labels.objective
    blank = Check(key=objective.key, subject=f"champion's {objective.name}")
    recorded = _recorded_score(bench.experiment.name, version, objective.key)
    if rows is None and may_have_seen_test(bench, prompt):
        untested = OTHER_SPLITS
    elif rows is not None and not rows:
        untested = "no new row has come into the test split"
    elif recorded is None:
        untested = "no score was recorded with it"
    else:
        try:
            return compare_scores(recorded, measure_prompt(bench, prompt, rows))
        except UserError as error:
            untested = str(error)
    return blank.model_copy(update={"untested": untested})


def _recorded_score(name: str, version: int, key: str) -> Recorded | None:
    """From the run that a version was registered on."""
    client = MlflowClient(tracking_uri())
    run_id = client.get_model_version(name, str(version)).run_id
    if run_id is None:
        return None
    run = client.get_run(run_id).data
    score, high, rows = f"{TEST}{key}", f"{TEST}{key}_high", "test_rows"
    if not {score, high} <= run.metrics.keys() or rows not in run.params:
        return None
    return Recorded(rows=int(run.params[rows]), score=run.metrics[score], high=run.metrics[high])


def _inputs(bench: Workbench, row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in bench.experiment.fields)


def _key(bench: Workbench, row: dict[str, str]) -> tuple[str, ...]:
    return (*_inputs(bench, row), row["label"])
