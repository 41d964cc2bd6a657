"""When drift is told, against samples of which it is known."""

from collections import Counter

import numpy as np
import pytest
from scipy.stats import chi2_contingency, ks_2samp

from softprompt.drift import Check, Drift, Recorded, compare_labels, compare_lengths, compare_scores
from softprompt.evaluation import measure, measure_targets
from softprompt.summary import _round


def drift(*checks: Check) -> Drift:
    return Drift(champion=3, compared="a with b", new_rows=5, gone_rows=0, checks=checks)


def test_shares_that_shifted_are_drift_with_the_size_of_the_shift():
    check = compare_labels({"no": 500, "yes": 500}, {"no": 30, "yes": 70})
    assert check.p == pytest.approx(chi2_contingency([[500, 500], [30, 70]], correction=False).pvalue)
    assert check.drifted
    assert check.effect == pytest.approx(0.115, abs=1e-3)
    assert (check.before, check.now) == ("no 50.0%, yes 50.0%", "yes 70.0%, no 30.0%")


def test_shares_of_the_same_source_are_no_drift_as_often_as_the_level_says():
    draw = np.random.default_rng(0)
    told = [
        compare_labels({"no": 500, "yes": 500}, {"no": int(n), "yes": 100 - int(n)}).drifted
        for n in draw.binomial(100, 0.5, size=500)
    ]
    assert sum(told) <= 15


def test_few_rows_are_told_by_permutation_and_always_alike():
    one, two = (compare_labels({"a": 30, "b": 2, "c": 1}, {"a": 1, "b": 3, "c": 1}) for _ in range(2))
    assert one.test == "chi-square, by permutation"
    assert one == two


@pytest.mark.parametrize(("before", "now"), [({"a": 4}, {"a": 5}), ({"a": 1, "b": 1}, {"a": 0, "b": 0}), ({}, {})])
def test_nothing_is_tested_without_rows_of_two_labels(before, now):
    check = compare_labels(before, now)
    assert (check.p, check.drifted) == (None, False)
    assert check.cells[3].startswith("not tested: ")


def test_a_label_that_is_new_counts():
    assert compare_labels({"a": 100, "b": 100}, {"a": 50, "b": 50, "c": 50}).drifted


def test_lengths_are_compared_as_the_rows_themselves_would_be():
    draw = np.random.default_rng(1)
    before, now = draw.poisson(20, 400), draw.poisson(24, 100)
    check = compare_lengths("inputs", "length", Counter(before.tolist()), Counter(now.tolist()))
    found = ks_2samp(before, now, method="asymp")
    assert check.p == pytest.approx(found.pvalue)
    assert check.effect == pytest.approx(found.statistic)
    assert check.drifted
    assert check.before == "median 20 tokens, half of them 17 to 23"
    assert not compare_lengths("inputs", "length", Counter(before.tolist()), Counter(before[:80].tolist())).drifted
    assert compare_lengths("inputs", "length", {}, {3: 1}).untested


def test_a_length_is_kept_exactly_or_to_eight_binary_digits():
    assert [_round(n) for n in (0, 7, 255, 256, 257, 1023, 32768)] == [0, 7, 255, 256, 256, 1020, 32768]
    assert len({_round(n) for n in range(32769)}) < 1200


def test_a_share_of_right_answers_that_fell_is_drift():
    recorded = Recorded(rows=1000, score=0.9, high=0.92)
    assert compare_scores(recorded, measure([0] * 100, [0] * 70 + [1] * 30)).drifted
    kept = compare_scores(recorded, measure([0] * 100, [0] * 88 + [1] * 12))
    assert not kept.drifted
    assert kept.effect == pytest.approx(-0.02)
    assert kept.before == "90.0% on 1,000 rows"
    assert kept.now == "88.0% on 100 rows (80.2% to 93.0%)"


def test_a_loss_that_rose_is_drift_and_its_interval_decides():
    draw = np.random.default_rng(2)

    def measured(loss: float, rows: int):
        return measure_targets(-draw.gamma(4, loss, rows), [4] * rows, np.zeros(rows, dtype=bool))

    before = measured(1.0, 400)
    recorded = Recorded(rows=400, score=before.score, high=before.high)
    assert compare_scores(recorded, measured(1.5, 100)).drifted
    check = compare_scores(recorded, measured(1.0, 100))
    assert not check.drifted
    assert check.key == "loss_per_token"


def test_the_page_says_drift_only_where_a_test_does():
    labels = compare_labels({"no": 500, "yes": 500}, {"no": 48, "yes": 52})
    lengths = compare_lengths("inputs", "length of the inputs", {5: 100}, {9: 100})
    quiet, loud = drift(labels), drift(labels, lengths)
    assert quiet.verdict == "no drift seen (label shares p 0.7)"
    assert quiet.describe().startswith(
        "**No drift seen (label shares p 0.7)**\n\na with b.\n\n|  | champion v3 | now |"
    )
    assert loud.verdict.startswith("drift: length of the inputs (p ")
    assert loud.metrics.keys() == {
        "drift_seen",
        "drift_new_rows",
        "drift_gone_rows",
        "drift_labels_p",
        "drift_labels_effect",
        "drift_inputs_p",
        "drift_inputs_effect",
    }
    assert (quiet.metrics["drift_seen"], loud.metrics["drift_seen"]) == (0, 1)
    assert drift(Check(key="labels", subject="rows", untested="x")).verdict == "no drift seen (nothing could be tested)"
