"""Whole flows against a real Prefect server, on a tiny model."""

import csv
import json
import os
import shutil
from pathlib import Path
from uuid import UUID

import mlflow
import pytest
from mlflow import MlflowClient
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas import TaskRun
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import Artifact
from prefect.client.schemas.sorting import TaskRunSort
from prefect.states import State

from flows.evaluate import evaluate
from flows.predict import choose_prompt, predict_file
from flows.sweep import SweepResult, sweep
from flows.tune import tune
from softprompt import registry, training
from softprompt.errors import UserError
from softprompt.home import tracking_uri
from softprompt.loading import load_backbone
from softprompt.prediction import Predictor
from softprompt.progress import Lines, watched_by
from softprompt.registry import champion_version, load_registered
from softprompt.search import load_study
from softprompt.spec import ExperimentSpec, LocalModel
from softprompt.storage import study_store
from softprompt.tracking import Tracker
from tasks.policy import run_link
from tests.tiny import tiny_experiment, tiny_model, tiny_text_experiment, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> ExperimentSpec:
    return tiny_experiment(tmp_path_factory.mktemp("flows"), name="tiny-flows")


@pytest.fixture(scope="module")
def swept(experiment: ExperimentSpec, prefect_server: None) -> State[SweepResult]:
    """The end of a first sweep."""
    state: State[SweepResult] = sweep(experiment, return_state=True)
    return state


@pytest.fixture(scope="module")
def swept_again(experiment: ExperimentSpec, swept: State[SweepResult]) -> State[SweepResult]:
    """The end of a second sweep of the same experiment."""
    state: State[SweepResult] = sweep(experiment, return_state=True)
    return state


def only(state: State) -> FlowRunFilter:
    assert state.state_details.flow_run_id is not None
    return FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))


STATE = ("mlruns", "mlflow.db", ".softprompt")
BEFORE = {name for name in STATE if (Path.cwd() / name).exists()}
"""What a user's own sweeps have left in the working directory."""


def task_runs(state: State) -> list[TaskRun]:
    """The task runs of a flow run, in the order of their begin."""
    with get_client(sync_client=True) as client:
        found: list[TaskRun] = client.read_task_runs(
            flow_run_filter=only(state), sort=TaskRunSort.EXPECTED_START_TIME_ASC
        )
        return found


def artifacts(state: State) -> dict[str | None, Artifact]:
    flow_run = state.state_details.flow_run_id
    assert isinstance(flow_run, UUID)
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run]))
        )
        return {artifact.key: artifact for artifact in found}


def states(state: State) -> dict[str, str | None]:
    """The end of each task by the task's name; those that record a trial are left out."""
    found = {run.name.rsplit("-", 1)[0]: run.state_name for run in task_runs(state)}
    return {name: end for name, end in found.items() if not name.startswith("trial ")}


def mlflow_statuses(experiment: ExperimentSpec) -> set[str]:
    runs = MlflowClient(tracking_uri()).search_runs([Tracker(experiment).experiment_id])
    return {run.info.status for run in runs}


def test_a_sweep_ends_with_a_registered_champion(swept, experiment):
    result = swept.result()
    assert [t.number for t in result.trials] == [0, 1, 2, 3]
    assert list(result.evaluation.systems)[:4] == [
        "majority class",
        "TF-IDF + logistic regression",
        "no prompt",
        "instruction",
    ]
    assert list(result.evaluation.systems)[-1] == f"winner, {result.evaluation.title}"
    assert {m.rows for m in result.evaluation.systems.values()} == {60}
    assert (result.decision.version, result.decision.promoted) == (1, True)
    finished = [t for t in result.trials if t.outcome == "finished"]
    assert result.evaluation.title == max(finished, key=lambda t: t.score or 0).title


def test_the_records_of_a_sweep_say_what_came_of_it(swept, experiment):
    result, client = swept.result(), MlflowClient(tracking_uri())
    parent = client.get_run(result.sweep.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["prefect.flow_run_id"] == str(swept.state_details.flow_run_id)
    assert parent.data.tags["softprompt.decision"] == f"v1 promoted: {result.decision.reason}"
    assert parent.data.metrics["test_accuracy"] == result.evaluation.winner.accuracy
    assert {"evaluation.json", "evaluation.png", "data.json"} <= {
        a.path for a in client.list_artifacts(parent.info.run_id)
    }
    winner = client.get_run(result.evaluation.run_id)
    assert winner.data.tags["softprompt.winner"] == "true"
    assert winner.data.metrics["test_accuracy"] == result.evaluation.winner.accuracy


def test_a_person_can_read_the_run_on_its_page(swept):
    result, found = swept.result(), artifacts(swept)
    assert {"data", "mlflow-run", "trials", "result", "decision"} <= found.keys()
    for trial in result.trials:
        assert json.dumps(trial.title) in str(found["trials"].data)
    assert f"| winner, {result.evaluation.title} | " in str(found["result"].data)
    assert str(found["decision"].data).startswith("**tiny-flows v1 is the new champion**")
    assert f"/runs/{result.sweep.run_id}" in str(found["mlflow-run"].data)


def test_every_trial_is_a_task_run_named_for_its_end(swept):
    names = [run.name for run in task_runs(swept)]
    for trial in swept.result().trials:
        assert [n for n in names if n.startswith(f"{trial.title}: {trial.outcome}")]


def test_a_second_sweep_takes_from_the_cache_what_the_inputs_decide(swept_again):
    found = states(swept_again)
    assert (found["prepare_data"], found["evaluate_baselines"]) == ("Cached", "Cached")
    assert (found["tune_prompts"], found["register_prompt"]) == ("Completed", "Completed")


def test_a_second_sweep_of_one_seed_finds_the_same_and_keeps_the_champion(swept, swept_again, experiment):
    first, second = swept.result(), swept_again.result()
    assert second.evaluation.title == first.evaluation.title
    assert second.evaluation.winner == first.evaluation.winner
    assert second.evaluation.champion == first.evaluation.winner
    assert (second.decision.version, second.decision.promoted, champion_version(experiment.name)) == (2, False, 1)
    assert "champion v1" in second.evaluation.systems


def test_the_working_directory_stays_clean(swept_again):
    assert {name for name in STATE if (Path.cwd() / name).exists()} == BEFORE
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_prepared_data_that_is_gone_is_made_anew(tmp_path):
    other = tiny_experiment(tmp_path, name="tiny-gone", seed=7, budget={"trials": 1})
    first = evaluate_fails_without_champion(other)
    folder = Path(os.environ["SOFTPROMPT_CACHE"]) / "data"
    for prepared in folder.iterdir():
        shutil.rmtree(prepared)
    assert states(first)["prepare_data"] == "Completed"
    assert states(evaluate_fails_without_champion(other))["prepare_data"] == "Completed"


def evaluate_fails_without_champion(experiment: ExperimentSpec) -> State:
    state: State = evaluate(experiment, return_state=True)
    with pytest.raises(UserError, match="no such registered prompt"):
        state.result()
    return state


def test_a_champion_of_another_base_model_is_kept_with_the_reason(swept_again, experiment, tmp_path):
    other = tiny_experiment(tmp_path, name=experiment.name, model={"kind": "local", "path": str(tmp_path / "other")})
    tiny_model(seed=5).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    result = sweep(other.with_one_trial())
    assert (result.decision.promoted, champion_version(experiment.name)) == (False, 1)
    assert result.decision.reason.startswith(
        "champion v1 could not be measured on these rows: the prompt belongs to another base model"
    )
    assert (result.evaluation.champion, result.evaluation.champion_version) == (None, 1)


def test_a_champion_that_may_have_seen_the_test_rows_is_shown_with_the_doubt_and_kept(swept, experiment):
    other = experiment.model_copy(update={"seed": 1})
    doubt = "other splits: may have seen test rows"
    result = sweep(other.with_one_trial())
    assert f"champion v1 ({doubt})" in result.evaluation.systems
    assert (result.decision.promoted, champion_version(experiment.name)) == (False, 1)
    assert result.decision.reason == f"champion v1 could not be measured on these rows: {doubt}"
    assert list(evaluate(other))[-1] == f"tiny-flows champion ({doubt})"


def test_evaluate_measures_what_is_registered(swept, experiment):
    systems = evaluate(experiment)
    assert list(systems)[-1] == "tiny-flows champion"
    assert systems["tiny-flows champion"] == swept.result().evaluation.winner
    runs = MlflowClient(tracking_uri()).search_runs(
        [Tracker(experiment).experiment_id], "attributes.run_name = 'evaluate tiny-flows champion'"
    )
    assert runs[0].info.status == "FINISHED"
    assert runs[0].data.metrics["test_accuracy"] == systems["tiny-flows champion"].score
    assert runs[0].data.params["test_rows"] == "60"
    assert runs[0].data.tags["prefect.flow_run_id"]


def test_a_version_that_is_not_there_is_told_before_anything_is_measured(swept, experiment):
    state: State = evaluate(experiment, version="99", return_state=True)
    with pytest.raises(UserError, match="tiny-flows/99: no such registered prompt"):
        state.result()
    assert "evaluate_baselines" not in states(state)


def test_the_link_to_a_run_shows_no_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example/at/")
    assert run_link("3", "abc") == "https://mlflow.example/at/#/experiments/3/runs/abc"


def test_new_weights_at_the_same_place_are_measured_anew(tmp_path):
    local = tiny_experiment(tmp_path, name="tiny-replaced", budget={"trials": 1})
    tune(local)
    tiny_model(seed=3).save_pretrained(tmp_path / "model")
    load_backbone.cache_clear()  # as in a new process
    state: State = tune(local, return_state=True)
    assert (states(state)["prepare_data"], states(state)["evaluate_baselines"]) == ("Cached", "Completed")


def test_a_step_that_fails_after_the_version_is_made_is_tried_again_without_another(tmp_path, monkeypatch):
    real, calls = registry.decide, []

    def fail_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise OSError("the server is away")
        return real(*args, **kwargs)

    monkeypatch.setattr(registry, "decide", fail_once)
    retried = tiny_experiment(tmp_path, name="tiny-retried", budget={"trials": 1})
    assert sweep(retried).decision.version == 1
    assert len(MlflowClient(tracking_uri()).search_model_versions("name = 'tiny-retried'")) == 1
    assert mlflow_statuses(retried) == {"FINISHED"}


def test_a_step_that_fails_after_the_table_is_made_is_tried_again_without_doubling_it(tmp_path, monkeypatch):
    real, calls = Tracker.log_winner, []

    def fail_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise OSError("the server is away")
        return real(*args)

    monkeypatch.setattr(Tracker, "log_winner", fail_once)
    retried = tiny_experiment(tmp_path, name="tiny-table", budget={"trials": 1})
    systems = tune(retried).systems
    client = MlflowClient(tracking_uri())
    (parent,) = client.search_runs([Tracker(retried).experiment_id], "tags.`softprompt.winner` IS NULL")
    with registry._fluent():  # it searches with MLflow's fluent functions
        table = client.load_table(parent.info.experiment_id, "evaluation.json", [parent.info.run_id])
    assert list(table["system"]) == list(systems)
    assert list(table["accuracy"]) == pytest.approx([m.score for m in systems.values()])
    assert json.loads(parent.data.tags["mlflow.loggedArtifacts"]) == [{"path": "evaluation.json", "type": "table"}]


def test_an_evaluation_that_is_tried_again_leaves_its_first_run_closed(swept, experiment, monkeypatch):
    real, calls = Tracker.log_evaluation, []

    def fail_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise OSError("the server is away")
        return real(*args)

    monkeypatch.setattr(Tracker, "log_evaluation", fail_once)
    state: State = evaluate(experiment, return_state=True)
    runs = MlflowClient(tracking_uri()).search_runs(
        [Tracker(experiment).experiment_id], f"tags.`prefect.flow_run_id` = '{state.state_details.flow_run_id}'"
    )
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED"]


def test_tune_trains_the_first_start_and_registers_nothing(experiment, tmp_path):
    single = tiny_experiment(tmp_path, name="tiny-single")
    evaluation = tune(single)
    assert (evaluation.trial, evaluation.title) == (0, "trial 0: labels · P=4 · lr 0.1")
    assert champion_version("tiny-single") is None
    assert mlflow_statuses(single) == {"FINISHED"}


@pytest.fixture(scope="module")
def text_experiment(tmp_path_factory) -> ExperimentSpec:
    return tiny_text_experiment(tmp_path_factory.mktemp("texts"), name="tiny-texts")


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What a person is told during the sweep of free text."""
    return []


@pytest.fixture(scope="module")
def swept_texts(text_experiment: ExperimentSpec, said: list[str], prefect_server: None) -> State[SweepResult]:
    """The end of a sweep of an experiment in free text."""
    with watched_by(Lines(said.append)):
        state: State[SweepResult] = sweep(text_experiment, return_state=True)
    return state


def test_a_sweep_of_free_text_ends_with_the_champion_of_the_lowest_loss(swept_texts, text_experiment):
    result = swept_texts.result()
    assert list(result.evaluation.systems) == ["no prompt", "instruction", f"winner, {result.evaluation.title}"]
    finished = [t for t in result.trials if t.outcome == "finished"]
    assert result.evaluation.title == min(finished, key=lambda t: t.score).title
    loss = f"{result.evaluation.winner.score:.4f} nats per token"
    assert result.decision.reason == f"the first version, with {loss} on 60 test rows"
    assert champion_version(text_experiment.name) == 1
    assert load_study(result.sweep.name, study_store(), text_experiment).direction.name == "MINIMIZE"


def test_a_person_is_told_of_texts_that_were_cut_and_of_losses(swept_texts, said):
    loss = swept_texts.result().trials[0].score
    assert "12 texts are longer than labels.max_new_tokens: cut, and matched by nothing" in said
    assert [line for line in said if line.startswith("trial 0: ") and f"best validation loss {loss:.4f} nats" in line]
    assert [line for line in said if f": finished with {loss:.4f} nats per token; 1 of 4 trials done" in line]


def test_the_records_of_free_text_are_named_for_what_they_are(swept_texts, text_experiment):
    result, client = swept_texts.result(), MlflowClient(tracking_uri())
    parent, winner = client.get_run(result.sweep.run_id), client.get_run(result.evaluation.run_id)
    measured = result.evaluation.winner
    assert parent.data.metrics == {
        "test_loss_per_token": measured.score,
        "test_loss_per_token_low": measured.low,
        "test_loss_per_token_high": measured.high,
        "test_exact_match": measured.exact_match,
    }
    assert parent.data.metrics.items() <= winner.data.metrics.items()
    own = {"train_loss", "val_loss_per_token", "val_exact_match", "best_val_loss_per_token", "seconds"}
    assert winner.data.metrics.keys() == own | parent.data.metrics.keys()
    history = client.get_metric_history(winner.info.run_id, "val_loss_per_token")
    assert [m.step for m in history] == text_experiment.rungs
    assert winner.data.metrics["best_val_loss_per_token"] == min(m.value for m in history)
    found = artifacts(swept_texts)
    assert "| system | loss per token | 95 % interval | exact match |" in str(found["result"].data)
    assert '"validation loss"' in str(found["trials"].data)
    assert json.loads(str(found["trials"].data))[0]["trial"] == result.evaluation.title


def test_a_registered_prompt_writes_texts_from_the_command_and_through_mlflow(swept_texts, tmp_path):
    swept_texts.result()
    texts = ["a great film", 'dull, and "old"', "[brackets] {braces}"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    predict_file(choose_prompt(None, "tiny-texts", "champion"), tmp_path / "rows.jsonl", tmp_path / "out.csv", "cpu")
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["text"] for row in rows] == texts
    assert any(row["answer"] for row in rows)
    with registry._fluent():
        answers = mlflow.pyfunc.load_model("models:/tiny-texts@champion").predict([{"text": text} for text in texts])
    assert [a.answer for a in answers] == [row["answer"] for row in rows]


def test_free_text_is_evaluated_anew_and_a_second_sweep_keeps_the_champion(swept_texts, text_experiment):
    first = swept_texts.result()
    systems = evaluate(text_experiment)
    assert systems["tiny-texts champion"] == first.evaluation.winner
    second: State[SweepResult] = sweep(text_experiment, return_state=True)
    assert states(second)["evaluate_baselines"] == "Cached"
    assert second.result().evaluation.champion == first.evaluation.winner
    loss = f"{first.evaluation.winner.score:.4f} nats per token"
    assert second.result().decision.reason == f"{loss} on 60 test rows is not better than champion v1 with {loss}"


def test_both_methods_are_swept_compared_registered_and_answer(tmp_path):
    point = {"length": 4, "initialization": "labels", "learning_rate": 0.1}
    space = {"length": 4, "learning_rate": 0.1, "initialization": [{"kind": "labels"}]}
    space |= {"pruner": {"kind": "none", "every": 6}}

    def swept_over(*methods: str) -> SweepResult:
        own = {"method": {"choices": methods}, "start": [point | {"method": method} for method in methods]}
        parts = {"search": space | own, "budget": {"trials": len(methods)}}
        parts |= {"execution": {"device": "cpu", "slots": len(methods)}}
        return sweep(tiny_experiment(tmp_path, name="tiny-methods", **parts))

    titles = ["prefix · labels · P=4 · lr 0.1", "labels · P=4 · lr 0.1"]
    both, prefix = swept_over("prefix_tuning", "prompt_tuning"), swept_over("prefix_tuning")
    assert [t.title.partition(": ")[2] for t in sorted(both.trials, key=lambda t: t.number)] == titles
    assert [t.title.partition(": ")[2] for t in prefix.trials] == titles[:1]
    assert {t.outcome for t in (*both.trials, *prefix.trials)} == {"finished"}
    assert (both.decision.version, prefix.decision.version) == (1, 2)
    assert list(prefix.evaluation.systems)[-2:] == ["champion v1", f"winner, {prefix.evaluation.title}"]
    registered = load_registered("tiny-methods", "2")
    assert registered.method == "prefix_tuning"
    (answer,) = Predictor.open(registered, device="cpu").predict([{"text": "a great film"}])
    assert answer.label in registered.words


def with_text_in_braces(folder: Path, name: str) -> ExperimentSpec:
    """An experiment whose one trial is named for a text with braces."""
    text = "{text} is {trial.title}?"
    space = {"length": 2, "learning_rate": 0.1, "initialization": [{"kind": "text", "text": text}]}
    pruner = {"kind": "none", "every": 6}
    return tiny_experiment(folder, name=name, search=space | {"pruner": pruner}, budget={"trials": 1})


def test_braces_in_a_text_are_text_on_the_page_of_the_run(tmp_path):
    state: State = tune(with_text_in_braces(tmp_path, "tiny-braces"), return_state=True)
    assert state.result().title == "trial 0: text · P=2 · lr 0.1 · text {text} is {trial.title}?"
    assert [run for run in task_runs(state) if run.name.startswith(f"{state.result().title}: finished")]


def test_a_page_that_cannot_be_written_ends_no_search(tmp_path, monkeypatch):
    real, calls = create_table_artifact, []

    def fail_once(**artifact):
        calls.append(artifact)
        if len(calls) == 1:
            raise OSError("the server is away")
        return real(**artifact)

    def refuse(*_):
        raise OSError("the server is away")

    monkeypatch.setattr("tasks.tune.create_table_artifact", fail_once)
    monkeypatch.setattr("tasks.tune.record_trial", refuse)
    state: State = tune(tiny_experiment(tmp_path, name="tiny-unseen"), return_state=True)
    assert state.result().trial == 0
    assert "trials" in artifacts(state)


def test_a_mistake_is_not_tried_again_and_leaves_nothing_behind(experiment, tmp_path):
    broken = experiment.model_copy(update={"name": "tiny-broken", "model": LocalModel(path=str(tmp_path / "nowhere"))})
    state: State = sweep(broken, return_state=True)
    with pytest.raises(UserError, match=r"model\.path: .*nowhere holds no config\.json"):
        state.result()
    opening = task_runs(state)[-1]
    assert (opening.name.rsplit("-", 1)[0], opening.run_count, opening.state_name) == ("open_study", 1, "Failed")
    assert MlflowClient(tracking_uri()).get_experiment_by_name("tiny-broken") is None


def test_a_mistake_in_the_template_leaves_nothing_behind(tmp_path):
    broken = tiny_experiment(tmp_path, name="tiny-template", template="Is this a good film or a bad one? {text}")
    broken = broken.model_copy(update={"training": broken.training.model_copy(update={"max_tokens": 8})})
    state: State = sweep(broken, return_state=True)
    with pytest.raises(UserError, match=r"training\.max_tokens: the template alone takes \d+ tokens"):
        state.result()
    assert (list(states(state))[-1], states(state)["open_study"]) == ("open_study", "Failed")
    assert MlflowClient(tracking_uri()).get_experiment_by_name("tiny-template") is None


def test_no_trial_that_finishes_is_a_clear_failure(tmp_path):
    space = {"length": 2, "learning_rate": 0.1, "initialization": [{"kind": "uniform", "bound": 1e39}]}
    broken = tiny_experiment(
        tmp_path, name="tiny-nan", search=space | {"pruner": {"kind": "none", "every": 6}}, budget={"trials": 2}
    )
    state: State = sweep(broken, return_state=True)
    with pytest.raises(UserError, match=r"no trial of tiny-nan-[-\w]+ finished; look at the reasons"):
        state.result()
    assert mlflow_statuses(broken) == {"FAILED"}


def test_an_interrupt_leaves_nothing_running_and_the_next_start_goes_on(tmp_path, monkeypatch: pytest.MonkeyPatch):
    stopped = tiny_experiment(tmp_path, name="tiny-stopped")
    real = training.step

    def interrupt(backbone, slots, passes):
        if slots[0].steps_done == 2:
            raise KeyboardInterrupt
        return real(backbone, slots, passes)

    with monkeypatch.context() as patched:
        patched.setattr("softprompt.lane.step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sweep(stopped)
    assert "RUNNING" not in mlflow_statuses(stopped)
    (name,) = {
        r.data.tags["optuna.study"] for r in MlflowClient(tracking_uri()).search_runs([Tracker(stopped).experiment_id])
    }
    assert [t.state.name for t in load_study(name, study_store(), stopped).trials] == ["RUNNING"]
    result = sweep(stopped)
    assert (result.sweep.name, result.sweep.resumed, result.decision.version) == (name, True, 1)
    assert len(result.trials) == stopped.budget.trials
    assert mlflow_statuses(stopped) <= {"FINISHED", "KILLED"}
