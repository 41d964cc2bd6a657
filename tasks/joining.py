"""How a lane from elsewhere comes into an open sweep: found by name, and joined only with what it was opened with.

Lanes meet in the study's storage and the tracking server alone. A lane with other rows, other weights or another
experiment would put scores into the study that compare with none there, so it is refused.
"""

from pathlib import Path

from mlflow import MlflowClient
from prefect import task

from softprompt.data import load_prepared
from softprompt.errors import UserError
from softprompt.home import require_tracking, tracking_uri, without_secrets
from softprompt.lane import Sweep
from softprompt.loading import load_backbone
from softprompt.progress import watcher
from softprompt.spec import ExperimentSpec
from softprompt.tracking import FINGERPRINT, OUTCOME, PARENT_RUN, STUDY
from tasks.policy import flow_tags, may_retry
from tasks.prepare import describe_data

DATA = "softprompt.data"
"""Tag of a sweep's runs: the digest of its rows."""
WEIGHTS = "softprompt.weights"
"""Tag of a sweep's runs: the hash of the frozen model."""


def identity_tags(experiment: ExperimentSpec, *, digest: str, weights: str) -> dict[str, str]:
    """What a lane has to have in common with a sweep that it joins."""
    return {FINGERPRINT: experiment.fingerprint, DATA: digest, WEIGHTS: weights}


def find_sweep(experiment: ExperimentSpec, name: str | None = None) -> Sweep:
    """The open sweep of an experiment, or the one of this name; its tags are those of its parent run.

    Raises UserError where there is none, or several to choose from.
    """
    client = MlflowClient(tracking_uri())
    found = client.get_experiment_by_name(experiment.name)
    asked = f"tags.`{OUTCOME}` IS NULL and tags.`{PARENT_RUN}` IS NULL and tags.`{STUDY}` LIKE '%'"
    runs = client.search_runs([found.experiment_id], asked) if found is not None else []
    sweeps = {
        run.data.tags[STUDY]: Sweep(name=run.data.tags[STUDY], run_id=run.info.run_id, tags=run.data.tags)
        for run in runs
    }
    where = without_secrets(tracking_uri())
    if name is not None:
        if name not in sweeps:
            known = ", ".join(sweeps) or "none"
            raise UserError(f"--sweep {name}: is no open sweep of {experiment.name} in {where}; open are {known}")
        return sweeps[name]
    # Of several that are open, the one of this very experiment.
    same = {n: s for n, s in sweeps.items() if s.tags.get(FINGERPRINT) == experiment.fingerprint} or sweeps
    if not same:
        raise UserError(
            f"{experiment.name} has no open sweep in {where}; start one with `softprompt sweep`, and give this lane "
            "the same MLFLOW_TRACKING_URI and SOFTPROMPT_STORAGE"
        )
    if len(same) > 1:
        raise UserError(f"{experiment.name} has several open sweeps; choose one with --sweep: {', '.join(same)}")
    return next(iter(same.values()))


def require_same(sweep: Sweep, own: dict[str, str]) -> None:
    """UserError where a lane's experiment, rows or weights are not those that the sweep was opened with."""
    words = {
        FINGERPRINT: ("experiment", "give this lane the file that the sweep was started with"),
        DATA: ("rows", "give this machine the same data files"),
        WEIGHTS: ("model", "give this machine the same weights"),
    }
    for tag, (what, advice) in words.items():
        theirs = sweep.tags.get(tag, "")
        if theirs != own[tag]:
            raise UserError(
                f"the {what} here has the hash {own[tag][:12]}, and {sweep.name} was opened with "
                f"{theirs[:12] or 'none'}; {advice}"
            )


@task(retries=2, retry_delay_seconds=5, retry_condition_fn=may_retry, log_prints=True)
def join_study(experiment: ExperimentSpec, data: str, name: str | None = None) -> Sweep:
    """Find the open sweep, and see that model and data here are those that it was opened with."""
    require_tracking()
    sweep = find_sweep(experiment, name)
    watcher().stage(describe_data(data))
    watcher().stage("loading the model")
    backbone = load_backbone(
        experiment.model,
        precision=experiment.precision,
        device=experiment.execution.device,
        compile=experiment.execution.compile,
    )
    digest = load_prepared(Path(data)).digest
    own = identity_tags(experiment, digest=digest, weights=backbone.weights_sha256)
    require_same(sweep, own)
    watcher().stage(f"joining {sweep.name}")
    # Its trials carry this flow run, so that they are told from those of whoever opened the sweep.
    return sweep.model_copy(update={"tags": own | flow_tags()})
