"""A registered prompt on the test split, beside the baselines: whether it still holds on these rows.

A prompt of another base model, or with other labels, is refused. Nothing is trained, and no alias moves.
"""

from prefect import flow

from flows.records import close_cancelled, close_failed
from softprompt.evaluation import Metrics
from softprompt.spec import ExperimentSpec
from tasks import evaluate_baselines, evaluate_registered, prepare_data, require_registered


@flow(
    name="evaluate",
    flow_run_name="{experiment.name}",
    log_prints=True,
    on_failure=[close_failed],
    on_crashed=[close_failed],
    on_cancellation=[close_cancelled],
)
def evaluate(experiment: ExperimentSpec, version: str = "champion") -> dict[str, Metrics]:
    """Measure a registered soft prompt on an experiment's test split.

    Args:
        experiment: The frozen model and the dataset.
        version: Alias or version number of the experiment's registered model.
    """
    data = prepare_data(experiment)
    require_registered(experiment, version)
    baselines = evaluate_baselines(experiment, data)
    return evaluate_registered(experiment, data, baselines, version)
