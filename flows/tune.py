"""One prompt with given settings, for a first look at an experiment: no search, no registry.

Its one trial takes the settings that the experiment starts with; the rest of the space is not looked at.
"""

from prefect import flow

from flows.records import close_cancelled, close_failed
from softprompt.spec import ExperimentSpec
from tasks import close_study, evaluate_baselines, evaluate_prompts, open_study, prepare_data, show_trials, tune_prompts
from tasks.evaluate import Evaluation


@flow(
    name="tune",
    flow_run_name="{experiment.name}",
    log_prints=True,
    on_failure=[close_failed],
    on_crashed=[close_failed],
    on_cancellation=[close_cancelled],
)
def tune(experiment: ExperimentSpec) -> Evaluation:
    """Train one soft prompt, the first that the experiment starts with, and measure it on the test split.

    Args:
        experiment: The frozen model, the dataset and the settings; its budget is taken as one trial.
    """
    single = experiment.with_one_trial()
    data = prepare_data(single)
    study = open_study(single, data, resumable=False)
    show_trials(single, tune_prompts(single, data, study))
    baselines = evaluate_baselines(single, data)
    evaluation = evaluate_prompts(single, data, study, baselines)
    close_study(single, study)
    return evaluation
