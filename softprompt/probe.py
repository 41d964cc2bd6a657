"""What a model does with a few random rows: decides by numbers, at loading, what may be computed and how.

The formula means something only if the model reads vectors as it reads tokens, does not look ahead, and says the same
of a row in any company; a composition may replace the formula only if it has its numbers. Nothing here goes by a name.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.batch import Batch, Example, Tree, collate, collate_tree, unfold
from softprompt.composition import Composition, as_prefix
from softprompt.encoder_decoder import start_token

UNABLE = (AssertionError, AttributeError, TypeError, ValueError, RuntimeError, LookupError)
"""What models raise that are asked for what they cannot do."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.02}
"""Largest deviation that is rounding, relative to what the prompts change."""
_TARGET = 4
"""Tokens of each row's target."""


class Probe:
    """Three rows after two prompts, and what the formula says of them; raises one of `UNABLE` if it can say nothing."""

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, formula: Composition[Any]) -> None:
        self.model = model
        self.tolerance = _TOLERANCE[model.dtype]
        self.formula = formula
        random = torch.Generator().manual_seed(0)
        table = model.get_input_embeddings().get_parameter("weight")
        self._vocabulary, width = table.shape
        spread = table.float().std().cpu()
        self._prompts = [(torch.randn(p, width, generator=random) * spread).to(table.device) for p in (3, 5)]
        self._owner = [0, 1, 0]
        rows = [torch.randint(self._vocabulary, (t,), generator=random).tolist() for t in (6, 9, 8)]
        self._examples = [Example(tuple(row[:-_TARGET]), tuple(row[-_TARGET:])) for row in rows]
        self._batch = self._lay_out(self._examples, self._owner)
        self._plain = self._run(formula, self._prompts, self._batch)
        self._without = self._run(formula, [p[:0] for p in self._prompts], self._batch)

    def deviation(self, composition: Composition[Any], *, prefixes: bool = False) -> float:
        """How far a composition is from the formula, relative to what the prompts change.

        With `prefixes`, the first of the two prompts is given to it as the prefix that this one leaves. Rounding in
        bfloat16 gives a few percent; states that are not those of the formula give more than half, and a model that
        cannot be run so at all gives infinity.
        """
        try:
            prompts = self._prompts
            if prefixes:
                prompts = [as_prefix(self.model, prompts[0]), *prompts[1:]]
            return self._distance(self._plain, self._run(composition, prompts, self._batch))
        except UNABLE:
            return float("inf")

    def find_fault(self) -> str | None:
        """Why soft prompts mean nothing for this model, in words with the number; None where they do."""
        if self._distance(self._plain, self._plain) != 0:  # 0 / 0 or inf - inf
            return "it says the same with any prompt, or no numbers at all"
        faults: dict[str, Callable[[], float]] = {
            "what it says of a row depends on the row's padding or neighbours": self._in_company,
            "it looks ahead, at the very tokens that it is to predict": self._ahead,
            "what it says of vectors is not what it says of the tokens that they stand for": self._by_tokens,
        }
        for fault, measure in faults.items():
            if not (found := measure()) <= self.tolerance:
                return f"{fault} (by {found:.2g} of what a prompt changes, and {self.tolerance:g} is rounding)"
        return None

    def reads_branches(self, composition: Composition[Any]) -> bool:
        """Whether continuations on branches of one row have the logits that each has on a row of its own.

        What differs is held against what it changes to read the branches as one line.
        """
        tokens = tuple(self._vocabulary // n for n in (3, 4, 5))
        ancestors = torch.tensor([[True, False, False], [False, True, False], [True, False, True]])
        parts = torch.tensor(tokens), torch.tensor([0, 0, 1]), ancestors
        inputs = [e.inputs for e in self._examples]
        batch = collate_tree(inputs, [0] * len(inputs), Tree(*(part.to(self.model.device) for part in parts)), pad=0)
        alone = self._run(composition, self._prompts[:1], unfold(batch))
        line = self._run(composition, self._prompts[:1], self._lay_out([Example(row, (*tokens, 0)) for row in inputs]))
        try:
            found = self._run(composition, self._prompts[:1], batch)
        except UNABLE:
            return False
        return bool((found - alone).norm() <= self.tolerance * (line - alone).norm())

    def _lay_out(self, examples: list[Example], owner: list[int] | None = None) -> Batch:
        return collate(examples, owner or [0] * len(examples), pad=0, device=self.model.device)

    @torch.inference_mode()
    def _run(self, composition: Composition[Any], prompts: list[Tensor], batch: Batch) -> Tensor:
        return composition(self.model, prompts, batch).float()

    def _distance(self, expected: Tensor, found: Tensor) -> float:
        """The difference of two logits, relative to what the prompts change, both as root mean squares."""
        return float(((found - expected).square().mean() / (self._without - self._plain).square().mean()).sqrt())

    def _ahead(self) -> float:
        """The first places of the rows, after which other tokens stand."""
        changed = [Example(e.inputs, tuple((t + 1) % self._vocabulary for t in e.target)) for e in self._examples]
        found = self._run(self.formula, self._prompts, self._lay_out(changed, self._owner))
        return self._distance(self._plain[::_TARGET], found[::_TARGET])

    @torch.inference_mode()
    def _by_tokens(self) -> float:
        """The longest row without a prompt, as the model reads it by itself."""
        row, model = self._examples[1], self.model
        parts = [[*row.inputs, *row.target[:-1]]]
        if model.config.is_encoder_decoder:
            parts = [[*row.inputs], [start_token(model), *row.target[:-1]]]
        names = ("input_ids", "decoder_input_ids")
        told = {name: torch.tensor([ids], device=model.device) for name, ids in zip(names, parts, strict=False)}
        mask = torch.ones_like(told["input_ids"])
        found = model(**told, attention_mask=mask, use_cache=False).logits[0, -_TARGET:].float()
        return self._distance(self._without[_TARGET : 2 * _TARGET], found)

    def _in_company(self) -> float:
        """The shortest row, after the shorter prompt, against itself with no other beside it and no padding."""
        alone = self._run(self.formula, self._prompts[:1], self._lay_out(self._examples[:1]))
        return self._distance(self._plain[:_TARGET], alone)
