"""Another lane for a sweep that is running: started on any machine that reaches its study and its tracking server.

It trains trials until the budget is spent, and neither evaluates nor registers: whoever opened the sweep does that.
What a lane leaves undone when it ends or dies, the others take up; so nothing is closed here, and no other lane's trial
is touched.
"""

from prefect import flow

from softprompt.spec import ExperimentSpec
from softprompt.trials import TrialRecord
from tasks import join_study, prepare_data, show_trials, tune_prompts


@flow(name="tune-lane", flow_run_name="{experiment.name}", log_prints=True)
def tune_lane(experiment: ExperimentSpec, sweep: str | None = None) -> list[TrialRecord]:
    """Train trials of an open sweep until there is nothing left to train.

    Args:
        experiment: The experiment that the sweep was started with; what it says of execution is for this machine.
        sweep: Name of the sweep; needed where the experiment has several that are open.
    """
    data = prepare_data(experiment)
    study = join_study(experiment, data, sweep)
    trials = tune_prompts(experiment, data, study)
    show_trials(experiment, trials)
    return trials
