"""Which settings a trial is given: TPE, whose draws forget nothing when the process does.

A sampler with one stream of random numbers goes on differently after it was interrupted, for nobody keeps the stream.
Here what trial n is given follows from the seed, n, and the trials that have ended by then, and from nothing in memory:
a trial that was left with half of its settings gets the same other half in another process.
"""

import hashlib
import warnings
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial


class Sampler(BaseSampler):
    """Optuna's multivariate TPE for a conditional space, with a stream for each trial, and for each setting on its own.

    Args:
        startup_trials: trials drawn at random before the scores are modelled.
        seed: of the experiment.
    """

    def __init__(self, *, startup_trials: int, seed: int) -> None:
        self._startup_trials = startup_trials
        self._seed = seed
        self._joint: TPESampler | None = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The settings that are drawn together."""
        with warnings.catch_warnings():
            # `group` is what makes a multivariate TPE model a conditional space; it has been experimental since 2.8.
            warnings.simplefilter("ignore", ExperimentalWarning)
            self._joint = self._sampler(group=True, stream=str(trial.number))
        return self._joint.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values of the settings that are drawn together."""
        assert self._joint is not None  # Optuna asks for the space first
        return self._joint.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A value of a setting that no trial has had yet, or before the scores are modelled."""
        alone = self._sampler(group=False, stream=f"{trial.number} {param_name}")
        return alone.sample_independent(study, trial, param_name, param_distribution)

    def _sampler(self, *, group: bool, stream: str) -> TPESampler:
        seed = hashlib.sha256(f"{self._seed} {stream}".encode()).digest()
        return TPESampler(
            multivariate=True,
            group=group,
            constant_liar=True,
            n_startup_trials=self._startup_trials,
            seed=int.from_bytes(seed[:4], "big"),
        )
