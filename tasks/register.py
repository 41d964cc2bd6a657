"""The winner into the registry, and the alias to whom it belongs."""

import tempfile
from pathlib import Path

from prefect import task
from prefect.artifacts import create_markdown_artifact

from softprompt import registry, retention
from softprompt.evaluation import as_markdown
from softprompt.progress import watcher
from softprompt.registry import Decision
from softprompt.spec import ExperimentSpec
from softprompt.sweep import Sweep
from softprompt.tracking import Tracker
from tasks.evaluate import Evaluation
from tasks.policy import may_retry


@task(retries=2, retry_delay_seconds=5, retry_condition_fn=may_retry, log_prints=True)
def register_prompt(experiment: ExperimentSpec, sweep: Sweep, evaluation: Evaluation) -> Decision:
    """Make the winner a version of the registered model; it becomes champion if it is better than the one there is."""
    watcher().stage("registering the winner")
    tracker = Tracker(experiment)
    with tempfile.TemporaryDirectory() as folder:
        prompt = tracker.fetch_prompt(evaluation.run_id, Path(folder))
        version = registry.register(experiment.name, sweep.run_id, prompt, evaluation.winner)
    decision = registry.decide(
        experiment.name,
        version,
        evaluation.winner,
        evaluation.champion,
        measured=evaluation.champion_version,
        why_not=evaluation.not_measured,
    )
    create_markdown_artifact(
        key="decision",
        markdown=f"**{decision.name} v{decision.version} {decision.verdict}**: {as_markdown(decision.reason)}.",
        description="Whether the winner takes the alias `champion`",
    )
    tracker.log_decision(sweep.run_id, decision.version, promoted=decision.promoted, reason=decision.reason)
    return decision


@task(log_prints=True)
def prune_prompts(experiment: ExperimentSpec, sweep: Sweep) -> None:
    """Delete the prompts that `execution.keep_prompts` does not keep; a store that refuses ends no sweep."""
    try:
        removed = retention.prune_prompts(experiment, sweep, experiment.execution.keep_prompts)
    except Exception as error:
        watcher().stage(f"old prompts are kept: they could not be deleted ({type(error).__name__}: {error})")
        return
    if removed:
        watcher().stage(f"deleted the prompts of {len(removed)} trials, by execution.keep_prompts")
