"""Soft prompts: P trained vectors before the frozen embeddings of the input.

The names below are the library. They load what they need when they are first used: `import softprompt` is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompt.backbone import Backbone as Backbone
    from softprompt.comparison import measure_prompt as measure_prompt
    from softprompt.errors import UserError as UserError
    from softprompt.prediction import Predictor as Predictor
    from softprompt.prediction import Writer as Writer
    from softprompt.prompt import SoftPrompt as SoftPrompt
    from softprompt.spec import load_experiment as load_experiment
    from softprompt.tuning import tune as tune
    from softprompt.workbench import Workbench as Workbench

_HOMES = {
    "Backbone": "backbone",
    "Predictor": "prediction",
    "SoftPrompt": "prompt",
    "UserError": "errors",
    "Workbench": "workbench",
    "Writer": "prediction",
    "load_experiment": "spec",
    "measure_prompt": "comparison",
    "tune": "tuning",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'softprompt' has no attribute {name!r}")
    return getattr(import_module(f"softprompt.{_HOMES[name]}"), name)
