"""A sweep on fresh data, from where the last one ended: for a schedule.

The champion is measured on the new rows, and the search starts from it. Without new rows nothing is searched; without a
champion it is a sweep.
"""

from typing import Annotated

from prefect import flow
from prefect.states import Completed
from pydantic import BaseModel, ConfigDict, Field

from flows.records import close_cancelled, close_failed
from flows.sweep import SweepResult, search_and_register
from softprompt.drift import Drift
from softprompt.retuning import EARLIER, News
from softprompt.spec import ExperimentSpec
from tasks import (
    choose_start,
    look_for_news,
    measure_drift,
    open_study,
    prepare_data,
    record_nothing_new,
    record_retune,
)


class RetuneResult(BaseModel):
    """What came of a retune."""

    model_config = ConfigDict(frozen=True)

    news: News
    drift: Drift | None = None
    """None where there was no champion, or nothing new."""
    swept: SweepResult | None = None
    """None where there was nothing new."""


@flow(
    name="retune",
    flow_run_name="{experiment.name}",
    log_prints=True,
    on_failure=[close_failed],
    on_crashed=[close_failed],
    on_cancellation=[close_cancelled],
)
def retune(experiment: ExperimentSpec, earlier: Annotated[int, Field(ge=0, le=100)] = EARLIER) -> RetuneResult:
    """Look for new rows and, if there are any, tell drift, search from the champion on, and register the winner.

    Args:
        experiment: The frozen model, the dataset that grows, and what to search for.
        earlier: How many of the best settings of earlier trials are tried first.
    """
    data = prepare_data(experiment)
    news = look_for_news(experiment, data)
    if news.nothing_new:
        record_nothing_new(experiment, data, news)
        # The result is what the state holds; its message is what a person sees first on the page of the run.
        return Completed(message=news.nothing_new, data=RetuneResult(news=news))  # type: ignore[return-value]
    drift = measure_drift(experiment, data, news)
    warm = choose_start(experiment, data, news, earlier)
    study = open_study(warm, data)
    record_retune(warm, data, study, drift)
    return RetuneResult(news=news, drift=drift, swept=search_and_register(warm, data, study))
