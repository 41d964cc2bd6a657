"""One thin Prefect task per step of a sweep. Tasks hand each other specs, paths, ids and records, never live models."""

from tasks.evaluate import evaluate_baselines, evaluate_prompts, evaluate_registered, require_registered
from tasks.joining import join_study
from tasks.prepare import prepare_data
from tasks.register import prune_prompts, register_prompt
from tasks.retune import choose_start, look_for_news, measure_drift, record_nothing_new, record_retune
from tasks.tune import close_study, open_study, show_trials, tune_prompts

__all__ = [
    "choose_start",
    "close_study",
    "evaluate_baselines",
    "evaluate_prompts",
    "evaluate_registered",
    "join_study",
    "look_for_news",
    "measure_drift",
    "open_study",
    "prepare_data",
    "prune_prompts",
    "record_nothing_new",
    "record_retune",
    "register_prompt",
    "require_registered",
    "show_trials",
    "tune_prompts",
]
