"""Metrics against numbers that are known from elsewhere."""

import math

import numpy as np
import pytest
from pydantic import TypeAdapter

from softprompt.evaluation import Metrics, TextMetrics, describe_table, measure, measure_scores, measure_targets
from softprompt.inference import Scores


def scores(rows: list[list[float]], legal: list[bool] | None = None) -> Scores:
    """Scores of rows whose label probabilities (of all the model could say) are given."""
    return Scores(np.log(np.array(rows, np.float32)), np.array(legal if legal is not None else [True] * len(rows)))


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_wilsons(right: int, rows: int, low: float, high: float):
    gold = np.zeros(rows, int)
    metrics = measure(gold.tolist(), (np.arange(rows) >= right).astype(np.int64))
    assert (metrics.rows, metrics.accuracy) == (rows, right / rows)
    assert metrics.low == pytest.approx(low, abs=5e-5)
    assert metrics.high == pytest.approx(high, abs=5e-5)


def test_macro_f1_counts_every_label_alike():
    metrics = measure([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0])
    # F1 of label 0: 2*2/(2*2+2+1); of 1: 2*1/(2*1+1+1); of 2: never right.
    assert metrics.macro_f1 == pytest.approx((4 / 7 + 1 / 2 + 0) / 3)
    assert metrics.correct == [True, True, False, True, False, False]


def test_log_loss_is_over_the_labels_and_not_the_vocabulary():
    metrics = measure_scores([0, 1], scores([[0.3, 0.1], [0.02, 0.02]]))
    assert metrics.log_loss == pytest.approx(-(math.log(0.75) + math.log(0.5)) / 2, rel=1e-6)


def test_illegal_outputs_are_counted_apart_from_wrong_ones():
    metrics = measure_scores(
        [0, 0, 0, 0], scores([[0.9, 0.1], [0.8, 0.1], [0.1, 0.8], [0.1, 0.2]], [True, False, True, False])
    )
    assert (metrics.accuracy, metrics.illegal) == (0.5, 0.5)


def test_all_right():
    metrics = measure_scores([0, 1, 1], scores([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]))
    assert (metrics.accuracy, metrics.macro_f1, metrics.illegal, metrics.high) == (1.0, 1.0, 0.0, 1.0)
    assert metrics.low == pytest.approx(0.43850, abs=1e-5)


def test_all_wrong_in_one_row():
    metrics = measure_scores([1], scores([[0.9, 0.1]]))
    assert (metrics.rows, metrics.accuracy, metrics.low, metrics.macro_f1) == (1, 0.0, 0.0, 0.0)
    assert metrics.high == pytest.approx(0.79345, abs=1e-5)
    assert metrics.log_loss == pytest.approx(-math.log(0.1), rel=1e-5)


def test_a_split_of_one_label_has_a_log_loss():
    assert measure_scores([1, 1], scores([[0.5, 0.5], [0.5, 0.5]])).log_loss == pytest.approx(math.log(2))


def test_a_certain_mistake_costs_much_but_not_everything():
    certain = Scores(np.array([[0.0, -200.0]], np.float32), np.array([True]))
    loss = measure_scores([1], certain).log_loss
    assert loss is not None
    assert 30 < loss < math.inf


def test_metrics_survive_json():
    metrics = measure_scores([0, 1], scores([[0.3, 0.1], [0.02, 0.05]]))
    assert type(metrics).model_validate_json(metrics.model_dump_json()) == metrics


def texts(nats: list[float], lengths: list[int], exact: list[bool] | None = None) -> TextMetrics:
    return measure_targets(-np.array(nats), lengths, np.array(exact if exact is not None else [False] * len(nats)))


def test_a_row_counts_by_its_tokens():
    metrics = texts([6.0, 1.0], [3, 1], [False, True])
    assert (metrics.rows, metrics.tokens, metrics.log_loss, metrics.exact_match) == (2, 4, 1.75, 0.5)
    assert metrics.numbers == {"loss_per_token": 1.75, "exact_match": 0.5}
    assert metrics.correct == [False, True]


def test_the_interval_of_rows_of_one_token_is_that_of_their_mean():
    nats = np.random.default_rng(0).exponential(2.0, 50)
    metrics = texts(nats.tolist(), [1] * 50)
    half = 1.959964 * nats.std(ddof=1) / math.sqrt(50)
    assert [metrics.low, metrics.high] == pytest.approx([nats.mean() - half, nats.mean() + half])


def test_the_interval_holds_the_true_loss_as_often_as_it_says():
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        lengths = random.integers(1, 30, 80)
        # A row of its own difficulty, of mean 2 nats a token: the tokens of a row are no draws of their own.
        metrics = texts((lengths * random.gamma(4.0, 0.5, 80)).tolist(), lengths.tolist())
        held += metrics.low <= 2.0 <= metrics.high
    assert 0.91 <= held / 400 <= 0.98


def test_one_row_has_no_spread_and_no_loss_is_below_zero():
    assert (texts([3.0], [2]).low, texts([3.0], [2]).high) == (1.5, 1.5)
    assert texts([0.0, 4.0], [1, 1]).low == 0.0


def test_the_table_is_markdown_in_the_order_of_the_systems():
    by_text = measure([0, 1, 1, 1], [0, 0, 1, 1])
    by_model = measure_scores([0, 1], scores([[0.9, 0.1], [0.2, 0.8]], [True, False]))
    assert describe_table({"TF-IDF": by_text, "winner": by_model}) == (
        "| system | accuracy | 95 % interval | macro F1 | illegal |\n"
        "|---|---|---|---|---|\n"
        "| TF-IDF | 75.0% | 30.1% to 95.4% | 0.733 |  |\n"
        "| winner | 100.0% | 34.2% to 100.0% | 1.000 | 50.0% |"
    )


def test_a_name_cannot_break_the_table():
    hostile = "a|b\n| <script>alert(1)</script> [x](javascript:y) `*_"
    row = describe_table({hostile: measure([0], [0])}).splitlines()[2]
    shown = r"| a\|b \| &lt;script&gt;alert(1)&lt;/script&gt; \[x\](javascript:y) \`\*\_ | 100.0%"
    assert row.startswith(shown)


def test_the_table_of_texts_has_their_own_columns():
    assert describe_table({"no prompt": texts([6.0], [3]), "winner": texts([0.6], [3], [True])}) == (
        "| system | loss per token | 95 % interval | exact match |\n"
        "|---|---|---|---|\n"
        "| no prompt | 2.0000 | 2.0000 to 2.0000 | 0.0% |\n"
        "| winner | 0.2000 | 0.2000 to 0.2000 | 100.0% |"
    )


def test_texts_and_labels_are_told_apart_in_json():
    systems = TypeAdapter(dict[str, Metrics])
    both: dict[str, Metrics] = {"label": measure([0, 1], [0, 0]), "text": texts([6.0], [3])}
    assert systems.validate_json(systems.dump_json(both)) == both
