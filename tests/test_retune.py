"""Retunes against a real Prefect server, on a tiny model and rows that grow."""

import csv
import json
import shutil
from itertools import count
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from prefect.states import State
from typer.testing import CliRunner

from flows.cli import app
from flows.retune import RetuneResult, retune
from flows.sweep import sweep
from softprompt.data import load_prepared, prepare
from softprompt.errors import UserError
from softprompt.exposure import may_have_seen_test
from softprompt.home import cache_home, tracking_uri
from softprompt.progress import Lines, watched_by
from softprompt.registry import champion_version, load_registered
from softprompt.retuning import find_news, tell_drift, warm_start
from softprompt.spec import ExperimentSpec
from softprompt.tracking import Tracker
from softprompt.workbench import Workbench
from tests.test_flows import artifacts, states
from tests.tiny import tiny_experiment, tiny_model, tiny_text_experiment, write_rows

_names = (f"retune-{n}" for n in count())
pytestmark = pytest.mark.usefixtures("prefect_server")


def add_other_rows(file: Path, rows: int = 120) -> None:
    """More rows, but for a few all positive, and longer than those that are there."""
    with file.open("a", encoding="utf-8", newline="") as stream:
        for n in range(rows):
            label = "negative" if n % 10 == 0 else "positive"
            csv.writer(stream).writerow([f"{'the film is a film of great time and story ' * 2}{n}", label, "a film"])


def retuned(experiment: ExperimentSpec) -> tuple[State[RetuneResult], list[str]]:
    """The end of a retune, and what a person was told."""
    said: list[str] = []
    with watched_by(Lines(said.append)):
        state: State[RetuneResult] = retune(experiment, return_state=True)
    return state, said


def runs(experiment: ExperimentSpec, asked: str = "") -> list[Run]:
    return list(MlflowClient(tracking_uri()).search_runs([Tracker(experiment).experiment_id], asked))


def drift_of(run: Run) -> str:
    return Path(MlflowClient(tracking_uri()).download_artifacts(run.info.run_id, "drift.json")).read_text("utf-8")


def with_champion(folder: Path) -> ExperimentSpec:
    made = tiny_experiment(folder / "tiny", name=next(_names), budget={"trials": 2})
    sweep(made)
    return made


@pytest.fixture
def experiment(tmp_path: Path) -> ExperimentSpec:
    """An experiment of two trials with a champion, whose rows are in the folder `tiny`."""
    return with_champion(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> ExperimentSpec:
    """The same for tests that leave records and champion as they are."""
    return with_champion(tmp_path_factory.mktemp("shared"))


def with_rows(experiment: ExperimentSpec, file: Path) -> ExperimentSpec:
    return ExperimentSpec.model_validate(experiment.model_dump() | {"data": {"kind": "file", "path": str(file)}})


def test_without_a_champion_a_retune_is_a_sweep_and_says_so(tmp_path):
    fresh = tiny_experiment(tmp_path, name="retune-first", budget={"trials": 1})
    state, said = retuned(fresh)
    result = state.result()
    assert "retune-first has no champion yet: this retune is a sweep" in said
    assert (result.drift, champion_version("retune-first")) == (None, 1)
    assert result.swept is not None
    parent = MlflowClient(tracking_uri()).get_run(result.swept.sweep.run_id)
    assert parent.data.tags["softprompt.role"] == "retune"
    assert parent.data.tags["softprompt.fingerprint"] == fresh.fingerprint


def test_nothing_new_ends_early_with_one_small_record(experiment):
    before = len(runs(experiment))
    state, said = retuned(experiment)
    told = state.message or ""
    assert state.name == "Completed"
    assert told.startswith("nothing new: the rows are those of champion v1 (digest ")
    assert (said.count(told), state.result().swept) == (1, None)
    assert str(artifacts(state)["retune"].data) == f"{told}."
    assert set(states(state)) <= {"prepare_data", "look_for_news", "record_nothing_new"}
    (record,) = runs(experiment, "tags.`softprompt.role` = 'retune'")
    assert len(runs(experiment)) == before + 1
    assert (record.info.status, record.data.tags["softprompt.outcome"]) == ("FINISHED", "nothing new")
    assert record.data.tags["prefect.flow_run_id"] == str(state.state_details.flow_run_id)
    assert record.data.tags["mlflow.note.content"] == told


def test_more_rows_of_the_same_kind_are_no_drift_and_a_challenger_that_is_no_better_leaves_the_alias(
    experiment, tmp_path
):
    write_rows(tmp_path / "tiny" / "rows.csv", 300)
    # A rate at which nothing moves: every trial of the retune is where it started, the first at the champion.
    still = experiment.model_copy(update={"training": experiment.training.model_copy(update={"clip_norm": 1e-30})})
    state, said = retuned(still)
    result = state.result()
    assert result.drift is not None
    assert result.drift.seen == []
    assert (result.drift.new_rows, result.drift.gone_rows) == (60, 0)
    assert any(line.startswith("no drift seen (label shares p ") for line in said)
    assert result.swept is not None
    assert result.swept.evaluation.winner == result.swept.evaluation.champion
    assert (result.swept.decision.promoted, champion_version(experiment.name)) == (False, 1)
    assert " is not better than champion v1 " in result.swept.decision.reason

    again, _ = retuned(still)
    assert (again.message or "").startswith("nothing new: the rows are those of the last retune")


def test_planted_drift_is_told_and_the_search_starts_from_the_champion(experiment, tmp_path):
    champion = load_registered(experiment.name)
    add_other_rows(tmp_path / "tiny" / "rows.csv")
    state, _ = retuned(experiment)
    result = state.result()
    assert result.drift is not None
    assert result.swept is not None
    assert {"label shares", "length of the inputs"} <= set(result.drift.seen)
    page = str(artifacts(state)["drift"].data)
    assert page.startswith("**Drift: label shares (p ")
    assert "| label shares | " in page

    parent = MlflowClient(tracking_uri()).get_run(result.swept.sweep.run_id)
    assert parent.data.tags["softprompt.drift"].startswith("drift: label shares (p ")
    assert parent.data.metrics["drift_labels_p"] < 0.01
    assert parent.data.metrics["drift_inputs_effect"] > 0.3
    assert json.loads(drift_of(parent)) == result.drift.model_dump(mode="json")

    asked = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and tags.`optuna.trial` = '0'"
    (first,) = runs(experiment, asked)
    rate, length = champion.provenance["params"]["learning_rate"], champion.length
    assert (first.data.params["initialization"], first.data.params["length"]) == ("prompt", str(length))
    assert float(first.data.params["learning_rate"]) == rate
    source = f"{experiment.name} v1, sha256 {champion.vectors_sha256}"
    assert first.data.params["source_prompt"] == source
    assert first.data.params["prompt.source"] == f"models:/{experiment.name}/1"


def test_a_champion_of_another_base_model_is_told_and_the_start_is_cold(experiment, tmp_path):
    tiny_model(seed=5).save_pretrained(tmp_path / "other")
    for file in (tmp_path / "tiny" / "model").glob("token*"):
        shutil.copy(file, tmp_path / "other")
    write_rows(tmp_path / "tiny" / "rows.csv", 300)
    tree = experiment.model_dump() | {"model": {"kind": "local", "path": str(tmp_path / "other")}}
    other = ExperimentSpec.model_validate(tree).with_one_trial()
    state, said = retuned(other)
    result = state.result()
    assert result.swept is not None
    assert result.drift is not None
    assert any(
        line.startswith("a cold start, not from champion v1: ") and "belongs to another base model" in line
        for line in said
    )
    assert "belongs to another base model" in result.drift.checks[-1].untested
    assert result.swept.trials[0].title == "trial 0: labels · P=4 · lr 0.1"
    assert (result.swept.decision.promoted, champion_version(experiment.name)) == (False, 1)


def bench_of(experiment: ExperimentSpec) -> Workbench:
    return Workbench(experiment, prepare(experiment, cache_home()))


def test_a_champion_can_be_compared_with_on_rows_that_grew_and_its_heirs_too(shared, tmp_path):
    write_rows(tmp_path / "rows.csv", 400)
    bench = bench_of(with_rows(shared, tmp_path / "rows.csv"))
    before = bench_of(shared).data
    assert not may_have_seen_test(bench, load_registered(shared.name))
    trained_on = {*before.split("train")["text"], *before.split("validation")["text"]}
    assert not set(bench.data.split("test")["text"]) & trained_on
    start = warm_start(bench, 1, earlier=3)
    assert start.experiment.fingerprint != shared.fingerprint
    assert start.experiment.name == shared.name


def test_no_search_starts_from_a_champion_that_may_have_seen_the_test_rows(shared):
    start = warm_start(bench_of(shared.model_copy(update={"seed": 1})), 1, earlier=0)
    assert "may have been trained on rows of the test split" in start.told
    assert start.experiment.search == shared.search


def test_the_champion_comes_first_and_then_the_best_earlier_settings_of_the_space(shared):
    first, second, *others = warm_start(bench_of(shared), 1, earlier=3).experiment.search.start
    assert (first.initialization, second.initialization) == ("prompt", "prompt")
    assert second.learning_rate == pytest.approx(first.learning_rate / 3)
    trials = [run for run in runs(shared, "attributes.status = 'FINISHED'") if "length" in run.data.params]
    best = max(trials, key=lambda run: run.data.metrics["best_val_accuracy"])
    assert (others[0].initialization, str(others[0].length)) == (
        best.data.params["initialization"],
        best.data.params["length"],
    )
    assert shared.search.start[0] not in others[1:], "the same point is not tried twice"


def test_what_the_space_does_not_hold_any_more_is_not_tried(shared):
    narrow = shared.search.model_copy(update={"length": 20, "start": ()})
    search = warm_start(bench_of(shared.model_copy(update={"search": narrow})), 1, earlier=3).experiment.search
    assert search.start == ()
    assert search.initialization[-1].kind == "prompt"


def test_a_search_that_is_taken_up_again_is_asked_for_the_same(shared, tmp_path):
    """Trials of a sweep that has not come to its end are no earlier ones."""
    bench = bench_of(shared)
    before = warm_start(bench, 1, earlier=3)
    tracker = Tracker(shared)
    parent = tracker.start_sweep("open", shared, bench.data, {})
    params = {"length": 7, "initialization": "uniform", "learning_rate": 0.2, "method": "prompt_tuning"}
    run = tracker.start_trial(parent, study="open", number=0, name="0")
    tracker.log_params(run, params)
    tracker.log_metrics(run, {"best_val_accuracy": 1.0})
    tracker.end(run, "finished")
    assert warm_start(bench, 1, earlier=3) == before
    tracker.end(parent, "finished")
    assert warm_start(bench, 1, earlier=3).experiment.search.start[2].length == 7


def test_rows_that_are_gone_from_the_cache_are_compared_as_the_champion_remembers_them(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    write_rows(tmp_path / "rows.csv", 240)
    add_other_rows(tmp_path / "rows.csv")
    other = with_rows(shared, tmp_path / "rows.csv")
    drift = tell_drift(bench_of(other), 1)
    assert drift.new_rows is None
    assert "not in the cache" in drift.compared
    assert {"label shares", "length of the inputs"} <= set(drift.seen)
    assert " on 60 rows" in drift.checks[-1].now

    reworded = other.model_copy(update={"template": "{text} It is"})
    assert "were read with another template" in tell_drift(bench_of(reworded), 1).checks[0].untested


def test_a_dry_run_tells_drift_and_the_plan_and_records_nothing(shared, tmp_path):
    def planned(experiment: ExperimentSpec) -> str:
        (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment.model_dump(mode="json")))
        result = CliRunner().invoke(app, ["retune", str(tmp_path / "experiment.yaml"), "--dry-run"])
        assert result.exit_code == 0, result.output
        return result.stdout

    before = len(runs(shared))
    assert planned(shared).startswith("retune       nothing new: the rows are those of champion v1")
    write_rows(tmp_path / "rows.csv", 240)
    add_other_rows(tmp_path / "rows.csv")
    told = planned(with_rows(shared, tmp_path / "rows.csv"))
    assert told.startswith("retune       a warm start from champion v1; ")
    assert "\ndrift        drift: label shares (p " in told
    assert (
        "initialization uniform, normal, vocabulary, labels, text, prompt\n" in told
        or "none, only search.start" in told
    )
    assert len(runs(shared)) == before


def test_only_new_rows_of_the_test_split_are_asked_for_drift_of_the_score(shared, tmp_path):
    write_rows(tmp_path / "rows.csv", 300)
    bench = bench_of(with_rows(shared, tmp_path / "rows.csv"))
    drift = tell_drift(bench, 1)
    known = {text for split in ("train", "validation", "test") for text in bench_of(shared).data.split(split)["text"]}
    fresh = [text for text in bench.data.split("test")["text"] if text not in known]
    assert 0 < len(fresh) < 60
    assert f" on {len(fresh)} rows" in drift.checks[-1].now
    assert " on 60 rows" in drift.checks[-1].before


def test_free_text_drifts_in_its_lengths_and_its_loss(tmp_path):
    texts = tiny_text_experiment(tmp_path, name="retune-texts", budget={"trials": 1})
    sweep(texts)
    add_other_rows(tmp_path / "rows.csv")
    drift = tell_drift(bench_of(texts), 1)
    assert [check.key for check in drift.checks] == ["texts", "inputs", "loss_per_token"]
    assert {"length of the texts", "length of the inputs"} <= set(drift.seen)
    assert drift.checks[-1].test == "two means, normal"


def test_a_retune_that_failed_is_tried_again(experiment, tmp_path, monkeypatch):
    write_rows(tmp_path / "tiny" / "rows.csv", 300)

    def refuse(*_, **__):
        raise UserError("the registry is closed")

    with monkeypatch.context() as patched:
        patched.setattr("softprompt.registry.register", refuse)
        failed, _ = retuned(experiment)
    assert failed.name == "Failed"
    assert find_news(experiment, load_prepared(bench_of(experiment).data.path)).nothing_new == ""
