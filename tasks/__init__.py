"""One thin Prefect task per step of a sweep. Tasks hand each other specs, paths, ids and records, never live models."""

from tasks.evaluate import evaluate_baselines, evaluate_prompts, evaluate_registered, require_registered
from tasks.joining import join_study
from tasks.prepare import prepare_data
from tasks.register import register_prompt
from tasks.tune import close_study, open_study, show_trials, tune_prompts

__all__ = [
    "close_study",
    "evaluate_baselines",
    "evaluate_prompts",
    "evaluate_registered",
    "join_study",
    "open_study",
    "prepare_data",
    "register_prompt",
    "require_registered",
    "show_trials",
    "tune_prompts",
]
