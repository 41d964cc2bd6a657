"""What a prompt is compared with on the test split: what the user would have without it.

Every system answers the same rows in the same order, so that two of them can be compared row by row.
"""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from softprompt.errors import UserError
from softprompt.evaluation import LabelMetrics, Metrics, measure
from softprompt.prediction import Predictor
from softprompt.prompt import SoftPrompt
from softprompt.workbench import Workbench

MAJORITY = "majority class"
TFIDF = "TF-IDF + logistic regression"
NO_PROMPT = "no prompt"
INSTRUCTION = "instruction"


def measure_baselines(bench: Workbench) -> dict[str, Metrics]:
    """The systems without a soft prompt, on the test split; free text is for the frozen model alone."""
    systems: dict[str, Metrics] = {}
    if bench.target.labels:
        systems = {MAJORITY: _measure_majority(bench), TFIDF: _measure_tfidf(bench)}
    return {
        **systems,
        NO_PROMPT: _measure_text(bench),
        INSTRUCTION: _measure_text(bench, bench.experiment.evaluation.instruction),
    }


def measure_prompt(bench: Workbench, prompt: SoftPrompt, rows: Sequence[int] | None = None) -> Metrics:
    """A soft prompt on the test split, with its own template, words and limit of tokens.

    Args:
        bench: the experiment.
        prompt: the soft prompt.
        rows: places of the rows to measure on, at least one; all of them by default.

    Raises UserError where it belongs to another base model, to other targets or to other columns.
    """
    prompt.require(bench.backbone)
    target = bench.target.asked_of(prompt)
    missing = set(Predictor.fields_of(prompt)) - set(bench.experiment.fields)
    if missing:
        raise UserError(
            f"the prompt reads the column {min(missing)!r}, which the experiment's template does not name; "
            "evaluate it on an experiment with its own columns"
        )
    split = bench.split("test", template=prompt.template, max_tokens=prompt.max_tokens, position=prompt.position)
    chosen = range(len(split.inputs)) if rows is None else rows
    return target.measure(prompt.vectors, [split.inputs[n] for n in chosen], [split.answers[n] for n in chosen])


def _measure_majority(bench: Workbench) -> LabelMetrics:
    train, test = bench.split("train").answers, bench.split("test").answers
    majority = DummyClassifier(strategy="most_frequent").fit(np.zeros((len(train), 1)), train)
    return measure(test, majority.predict(np.zeros((len(test), 1))))


def _measure_tfidf(bench: Workbench) -> LabelMetrics:
    texts = _texts(bench, "train")
    words = TfidfVectorizer()
    if not any(map(words.build_analyzer(), texts)):  # no word of two letters: each sign is a word then
        words = TfidfVectorizer(token_pattern=r"\S")
    classifier = make_pipeline(words, LogisticRegression(max_iter=1000))
    classifier.fit(texts, bench.split("train").answers)
    return measure(bench.split("test").answers, classifier.predict(_texts(bench, "test")))


def _texts(bench: Workbench, split: str) -> list[str]:
    rows = bench.data.split(split)
    return ["\n".join(row[name] for name in bench.experiment.fields) for row in rows]


def _measure_text(bench: Workbench, instruction: str = "") -> Metrics:
    template = instruction.replace("{", "{{").replace("}", "}}") + bench.experiment.template
    # The instruction comes on top, as a soft prompt does: it must not take its tokens from the inputs.
    limit = bench.experiment.training.max_tokens
    limit += len(bench.backbone.tokenizer.encode(instruction, add_special_tokens=False))
    positions = getattr(bench.backbone.model.config, "max_position_embeddings", None)
    if positions:
        limit = min(limit, positions - bench.target.longest)
    split = bench.split("test", template=template, max_tokens=limit)
    nothing = torch.zeros(0, bench.backbone.hidden_size)
    return bench.measure(nothing, split)
