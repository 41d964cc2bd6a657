"""Everything that the trials of one experiment share in one process: the backbone, and the examples as tokens.

What cannot be trained on is refused here, before anything is: inputs that make no tokens or leave no room for their
fields, and prompt, input and label that the model has too few positions for.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from softprompt.backbone import Backbone
from softprompt.batch import Example
from softprompt.data import SPLITS, Encoded, PreparedData, encode_inputs, prepare, render
from softprompt.dropout import has_dropout
from softprompt.errors import UserError
from softprompt.evaluation import Metrics
from softprompt.home import cache_home
from softprompt.initialization import STRATEGIES
from softprompt.loading import load_backbone
from softprompt.loss import Loss, OverLabels, OverVocabulary
from softprompt.passes import Passes
from softprompt.sources import Source, open_source, require_source
from softprompt.spec import ExperimentSpec, Method, PromptInit, ResidualReparameterization
from softprompt.summary import Summary, summarize
from softprompt.target import open_target
from softprompt.training import Settings, Slot


@dataclass(frozen=True)
class Split:
    """The rows of a split as tokens."""

    inputs: list[tuple[int, ...]]
    """Token ids of each input."""
    answers: list[str]
    """What is to be said to each: its label, or its text."""
    cut: int
    """Inputs that were longer than `training.max_tokens` and had a field cut."""


class Workbench:
    """An experiment with its model loaded and its data tokenized."""

    def __init__(
        self, experiment: ExperimentSpec, data: PreparedData | None = None, backbone: Backbone | None = None
    ) -> None:
        self.experiment = experiment
        self.data = data or prepare(experiment, cache_home())
        backbone = backbone or load_backbone(
            experiment.model,
            precision=experiment.precision,
            device=experiment.execution.device,
            compile=experiment.execution.compile,
        )
        self.backbone = backbone.placed(experiment.prompt_position)
        self.target = open_target(experiment.labels, self.backbone)
        self._splits: dict[tuple[str, str, int, str], Split] = {}
        if "prefix_tuning" in experiment.search.methods:
            self.backbone.require_prefixes()
        self._sources: dict[str, Source] = {}
        for spec in experiment.search.initialization:
            if isinstance(spec, PromptInit):
                self.source(spec.source)
        self._check_positions()
        self._check_dropout()
        # A mistake in template or rows is told before there is a study or a run.
        self.targets = {name: self.target.encode(self.split(name).answers) for name in SPLITS}
        """Of each split, the targets as tokens, and how many of them were cut."""
        self.targets_cut = sum(cut for _, cut in self.targets.values())
        """Texts that were longer than `labels.max_new_tokens` and lost their end."""

    def split(
        self, name: str, *, template: str | None = None, max_tokens: int | None = None, position: str | None = None
    ) -> Split:
        """The rows of `train`, `validation` or `test`, by the experiment's template, limit and place or by others."""
        own = self.experiment
        key = (
            name,
            template or own.template,
            max_tokens or own.training.max_tokens,
            position or own.prompt_position,
        )
        if key not in self._splits:
            self._splits[key] = self._encode(*key)
        return self._splits[key]

    def _check_positions(self) -> None:
        limit = getattr(self.backbone.model.config, "max_position_embeddings", None)
        prompt, tokens = self.experiment.search.longest, self.experiment.training.max_tokens
        target = self.target.longest
        if limit and prompt + tokens + target > limit:
            raise UserError(
                f"search.length: up to {prompt} vectors, training.max_tokens={tokens} and a target of {target} tokens "
                f"make {prompt + tokens + target} positions, and the model has {limit}; lower one of them"
            )
        blank = render(self.experiment.template, dict.fromkeys(self.experiment.fields, ""))
        told = len(self.backbone.tokenizer.encode(self.experiment.evaluation.instruction + blank, verbose=False))
        if limit and told + target >= limit:
            raise UserError(
                f"evaluation.instruction: with the template and a target it takes {told + target} tokens, and the "
                f"model has {limit} positions; shorten it"
            )

    def _check_dropout(self) -> None:
        if self.experiment.search.may_drop_out and not has_dropout(self.backbone):
            raise UserError("search.dropout: the model has no dropout, its rates are zero; take it out")

    def _encode(self, name: str, template: str, max_tokens: int, position: str) -> Split:
        rows = self.data.split(name)
        encoded = self._encode_rows(rows, template, max_tokens, position)
        return Split(encoded.inputs, list(rows["label"]), encoded.cut)

    def encode(self, rows: Iterable[Mapping[str, str]]) -> Encoded:
        """Other rows as tokens, by the experiment's template, limit and place."""
        own = self.experiment
        return self._encode_rows(rows, own.template, own.training.max_tokens, own.prompt_position)

    def _encode_rows(self, rows: Iterable[Mapping[str, str]], template: str, max_tokens: int, position: str) -> Encoded:
        return encode_inputs(
            rows,
            template=template,
            fields=self.experiment.fields,
            tokenizer=self.backbone.tokenizer,
            max_tokens=max_tokens,
            apart=self.backbone.is_encoder_decoder,
            before=self.backbone.placed(position).before,
        )

    @cached_property
    def summary(self) -> Summary:
        """The rows of all splits in numbers, for a prompt to remember."""
        return summarize(self)

    @cached_property
    def loss(self) -> Loss:
        """What every prompt is trained for."""
        if self.experiment.training.loss == "labels":
            return OverLabels(self.backbone, list(self.target.labels.values()))
        return OverVocabulary()

    @cached_property
    def passes(self) -> Passes:
        """How every step is cut; smaller from now on where memory runs out."""
        execution, usual = self.experiment.execution, Passes.usual(self.backbone.device)
        return Passes(execution.micro_batch_tokens or usual.tokens, execution.gradient_checkpointing)

    @cached_property
    def examples(self) -> list[Example]:
        """The training rows."""
        targets, _ = self.targets["train"]
        return [Example(*row) for row in zip(self.split("train").inputs, targets, strict=True)]

    @property
    def longest_prompt(self) -> Tensor:
        """Zeros in the shape of the costliest prompt that may be tried: a soft prompt costs more than a prefix."""
        vectors = torch.zeros(self.experiment.longest, self.backbone.hidden_size)
        return vectors if "prompt_tuning" in self.experiment.search.methods else self.backbone.as_prefix(vectors)

    def measure(self, prompt: Tensor, split: Split) -> Metrics:
        """How well a prompt `[P, H]`, P may be 0, or a prefix `[L, 2, G, P, D]` answers the rows of a split."""
        return self.target.measure(prompt, split.inputs, split.answers)

    def start(self, params: dict[str, Any], *, seed: Sequence[int]) -> Slot:
        """A slot for one trial.

        Args:
            params: `length`, `initialization`, `learning_rate`, and the settings of the kind, as `uniform.bound`;
                beside them may stand `method` where it is not `prompt_tuning`, `reparameterization` with its own,
                `max_norm` and `dropout`.
            seed: what the trial's random streams are drawn from; the same gives the same prompt.

        Raises UserError where one of the first three is missing, a kind or the method is none, or the model does not
        take a prefix.
        """
        for name in ("length", "initialization", "learning_rate"):
            if name not in params:
                raise UserError(f"params: {name!r} is missing, found {', '.join(params) or 'none'}; add it")
        draws, order = np.random.SeedSequence(seed).generate_state(2)
        training = self.experiment.training
        settings = Settings(
            steps=training.steps,
            batch_size=training.batch_size,
            learning_rate=params["learning_rate"],
            schedule=training.schedule,
            warmup_steps=training.warmup_steps,
            weight_decay=training.weight_decay,
            clip_norm=training.clip_norm,
            seed=int(order),
            bottleneck=self._bottleneck(params),
            max_norm=params["max_norm"] * self._embedding_norm if params.get("max_norm") else None,
            dropout=params.get("dropout", False),
        )
        return Slot(self._initial(params, int(draws)), self.examples, settings, self.backbone.device, self.loss)

    def source(self, named: str) -> Source:
        """The prompt that a source names, found once; UserError where no prompt of the experiment can start from it."""
        if named not in self._sources:
            found = open_source(named)
            require_source(self, found)
            self._sources[named] = found
        return self._sources[named]

    def source_of(self, params: dict[str, Any]) -> Source | None:
        """The prompt that a trial starts from, if its settings say one."""
        if params["initialization"] != "prompt":
            return None
        if "prompt.source" not in params:
            raise UserError("params: 'prompt.source' is missing, which says what prompt to start from; add it")
        return self.source(params["prompt.source"])

    @cached_property
    def _embedding_norm(self) -> float:
        """Mean norm of the embeddings as the model looks them up."""
        vectors = self.backbone.embed(range(len(self.backbone.embeddings)))
        return float(torch.linalg.vector_norm(vectors, dim=1).mean())

    def _bottleneck(self, params: dict[str, Any]) -> int | None:
        match params.get("reparameterization", "none"):
            case "none":
                return None
            case "residual":
                return int(params.get("residual.bottleneck", ResidualReparameterization().bottleneck))
            case other:
                raise UserError(f"params: no reparameterization {other!r}; use none or residual")

    def _initial(self, params: dict[str, Any], seed: int) -> Tensor:
        kind, length = params["initialization"], params["length"]
        known = [name for name in STRATEGIES if name != "labels" or self.target.labels]
        if kind not in known:
            raise UserError(f"params: no initialization {kind!r}; use one of {', '.join(known)}")
        generator = torch.Generator().manual_seed(seed)
        own = {k.partition(".")[2]: v for k, v in params.items() if k.startswith(f"{kind}.")}
        if kind == "labels":
            own["words"] = list(self.target.labels.values())
        if source := self.source_of(params):
            own = {"vectors": source.prompt.vectors}
        vectors = STRATEGIES[kind](self.backbone, length, generator, **own)
        return self._to_method(vectors, params.get("method", "prompt_tuning"))

    def _to_method(self, vectors: Tensor, method: str) -> Tensor:
        """What is trained: the vectors, or the prefix that they leave, with the same logits."""
        if method not in get_args(Method):
            raise UserError(f"params: no method {method!r}; use one of {', '.join(get_args(Method))}")
        return self.backbone.as_prefix(vectors) if method == "prefix_tuning" else vectors
