"""The experiment that is measured on, with the frozen model in both sides' hands."""

from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import peer
from benchmarks.start import Rows, Start, steady
from softprompt.home import cache_home
from softprompt.loading import locate
from softprompt.spec import ExperimentSpec
from softprompt.workbench import Split, Workbench


class Subject:
    """An experiment, loaded; the peer's model is a copy of its own, as transformers loads it by default."""

    def __init__(self, experiment: ExperimentSpec) -> None:
        self.experiment = experiment
        self.folder = locate(experiment.model, cache_home())
        self.bench = Workbench(experiment)
        self.backbone = self.bench.backbone
        self.labels = list(self.bench.target.labels.values())

    @cached_property
    def base(self) -> PreTrainedModel:
        """The peer's frozen model."""
        return peer.load(self.folder, self.backbone.model.dtype, self.backbone.device)

    def prompt(self, length: int) -> Tensor:
        """A prompt `[P, H]` of sampled vocabulary."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(len(self.backbone.embeddings), (length,), generator=generator)
        return self.backbone.embed(ids.tolist()).cpu()

    def start(self, length: int, *, batch_size: int = 16, seed: int = 0) -> Start:
        """A prompt to measure the speed of training with."""
        return Start(self.prompt(length), self.bench.examples, steady(batch_size=batch_size, seed=seed))

    def validation(self, rows: int) -> Rows:
        """The first validation rows."""
        split = self.bench.split("validation")
        return split.inputs[:rows], gold(self.bench, split)[:rows]


def gold(bench: Workbench, split: Split) -> list[int]:
    """Index of each row's label among the experiment's."""
    order = list(bench.target.labels)
    return [order.index(answer) for answer in split.answers]
