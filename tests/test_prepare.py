import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from softprompt.data.prepare import SPLITS, PreparedData, data_key, load_prepared, prepare
from softprompt.errors import UserError
from softprompt.spec import ExperimentSpec, load_experiment, validate_experiment

DEFAULT = Path(__file__).parent.parent / "experiments" / "movie-sentiment.yaml"
WORDS = {"good": " good", "bad": " bad"}


def experiment(data: dict[str, Any], **changes: Any) -> ExperimentSpec:
    tree = load_experiment(DEFAULT).model_dump(mode="json")
    labels = {"kind": "column", "field": "label", "words": WORDS}
    small = {"data": {"kind": "file"} | data, "labels": labels, "splits": {"validation": 3, "test": 4}}
    return validate_experiment(tree | small | changes, "test")


def write(path: Path, rows: list[tuple[object, object]]) -> str:
    path.write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in rows), encoding="utf-8")
    return str(path)


def rows(count: int, name: str = "text") -> list[tuple[object, object]]:
    return [(f"{name} {n}", "good" if n % 2 else "bad") for n in range(count)]


def read(prepared: PreparedData) -> dict[str, list[tuple[str, str]]]:
    return {s: [(r["text"], r["label"]) for r in prepared.split(s).to_list()] for s in SPLITS}


def test_splits_are_carved_by_the_seed_and_share_no_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(20))
    prepared = prepare(experiment({"path": path}), tmp_path)
    splits = read(prepared)
    assert prepared.sizes == {"train": 13, "validation": 3, "test": 4} == {s: len(r) for s, r in splits.items()}
    assert sorted(chain(*splits.values())) == sorted((str(text), str(label)) for text, label in rows(20))
    assert prepared.labels == {s: {w: Counter(label for _, label in splits[s])[w] for w in WORDS} for s in SPLITS}
    assert prepared.left_out == {}
    assert prepared.source == path
    assert prepare(experiment({"path": path}), tmp_path / "elsewhere").digest == prepared.digest
    assert prepare(experiment({"path": path}, seed=1), tmp_path).digest != prepared.digest


def test_a_cap_leaves_the_other_splits_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(20))
    whole = read(prepare(experiment({"path": path}), tmp_path))
    capped = read(prepare(experiment({"path": path}, splits={"validation": 3, "test": 4, "train": 8}), tmp_path))
    assert capped == whole | {"train": whole["train"][:8]}


@pytest.mark.parametrize("more", [1, 7, 200])
def test_rows_that_were_trained_on_never_come_into_the_test_split_of_grown_data(more: int, tmp_path: Path) -> None:
    """Wherever in the file the new rows stand."""
    old, new = rows(40), rows(more, "new")
    before = prepare(experiment({"path": write(tmp_path / "a.jsonl", old)}), tmp_path)
    after = prepare(experiment({"path": write(tmp_path / "b.jsonl", new[1::2] + old + new[::2])}), tmp_path)
    was, now = ({row: s for s, rows in read(p).items() for row in rows} for p in (before, after))
    order = ("test", "validation", "train")
    assert all(order.index(now[row]) >= order.index(split) for row, split in was.items())
    assert after.test_bound is not None
    assert before.test_bound is not None
    assert after.test_bound <= before.test_bound


def test_splits_do_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    one = prepare(experiment({"path": write(tmp_path / "a.jsonl", rows(20))}), tmp_path)
    other = prepare(experiment({"path": write(tmp_path / "b.jsonl", rows(20)[::-1])}), tmp_path)
    assert one.digest == other.digest


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    odd: list[tuple[object, object]] = [
        ("text 1", "good"),  # again
        ("torn", "good"),
        ("torn", "bad"),
        ("torn", "bad"),
        ("  ", "good"),
        (None, "bad"),
    ]
    prepared = prepare(experiment({"path": write(tmp_path / "a.jsonl", rows(12) + odd)}), tmp_path)
    assert prepared.left_out == {"empty input": 2, "conflicting labels": 3, "duplicate": 1}
    assert sum(prepared.sizes.values()) == 12


def test_ratings_in_no_bin_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"{n / 10}\ttext {n}\n" for n in range(-10, 11)), encoding="utf-8")
    data = {"path": str(path), "columns": ["rating", "text"]}
    prepared = prepare(experiment(data, labels=load_experiment(DEFAULT).labels.model_dump(mode="json")), tmp_path)
    assert prepared.left_out == {"no label": 9}
    assert Counter(sum((Counter(c) for c in prepared.labels.values()), Counter())) == {"negative": 6, "positive": 6}
    assert ("text 5", "positive") in chain(*read(prepared).values())


def test_named_splits_keep_their_rows_but_for_overlap_and_conflict(tmp_path: Path) -> None:
    twice = rows(4, "test") + rows(1, "test")
    data = {
        "train": write(tmp_path / "train.jsonl", rows(6, "train") * 2 + rows(2, "test") + rows(1, "validation")),
        "validation": write(tmp_path / "validation.jsonl", [*rows(4, "validation"), ("test 0", "good")]),
        "test": write(tmp_path / "test.jsonl", [*twice, ("torn", "good"), ("torn", "bad")]),
    }
    prepared = prepare(experiment(data), tmp_path)
    splits = read(prepared)
    assert splits["test"] == twice
    assert prepared.test_bound is None
    assert splits["validation"] == rows(4, "validation")
    assert Counter(splits["train"]) == Counter(rows(6, "train") * 2)
    assert prepared.left_out == {"conflicting labels": 2, "stands in two splits": 4}


def test_a_split_that_is_not_named_is_carved_from_training_rows(tmp_path: Path) -> None:
    data = {
        "train": write(tmp_path / "train.jsonl", rows(10) + rows(2) + rows(1, "test")),
        "test": write(tmp_path / "test.jsonl", rows(6, "test")),
    }
    prepared = prepare(experiment(data), tmp_path)
    assert prepared.sizes == {"train": 7, "validation": 3, "test": 6}
    assert prepared.left_out == {"duplicate": 2, "stands in two splits": 1}


def test_a_prepared_folder_is_used_again_and_a_harmed_one_made_anew(tmp_path: Path) -> None:
    spec = experiment({"path": write(tmp_path / "a.jsonl", rows(12))})
    first = prepare(spec, tmp_path)
    assert first.path == tmp_path / "data" / data_key(spec)
    stamp = (first.path / "train.parquet").stat().st_mtime_ns
    assert prepare(spec, tmp_path) == first == load_prepared(first.path)
    assert (first.path / "train.parquet").stat().st_mtime_ns == stamp
    (first.path / "train.parquet").write_bytes((first.path / "test.parquet").read_bytes())
    with pytest.raises(UserError, match=f"expected rows with digest {first.digest}, found"):
        load_prepared(first.path)
    assert prepare(spec, tmp_path) == first == load_prepared(first.path)
    assert [p.name for p in first.path.parent.iterdir()] == [first.path.name]


def test_two_at_once_make_the_same_folder(tmp_path: Path) -> None:
    spec = experiment({"path": write(tmp_path / "a.jsonl", rows(200))})
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: prepare(spec, tmp_path), range(4)))
    assert all(m == load_prepared(made[0].path) for m in made)


def test_the_record_survives_json(tmp_path: Path) -> None:
    prepared = prepare(experiment({"path": write(tmp_path / "a.jsonl", rows(12))}), tmp_path)
    assert PreparedData.from_json(json.loads(json.dumps(prepared.as_json()))) == prepared


def test_the_key_follows_what_decides_the_rows_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(12))
    key = data_key(experiment({"path": path}))
    assert data_key(experiment({"path": path}, name="other", budget={"trials": 1})) == key
    assert data_key(experiment({"path": path}, template="{text} is")) == key
    assert data_key(experiment({"path": path}, seed=1)) != key
    assert data_key(experiment({"path": path}, splits={"validation": 3, "test": 5})) != key
    write(tmp_path / "a.jsonl", rows(13))
    assert data_key(experiment({"path": path})) != key


TEXT = {"kind": "text", "field": "label", "max_new_tokens": 9}


def free_text(data: dict[str, Any], **changes: Any) -> ExperimentSpec:
    kinds = [{"kind": "normal"}]
    search = load_experiment(DEFAULT).search.model_dump(mode="json") | {"initialization": kinds, "start": []}
    return experiment(data, **{"labels": TEXT, "search": search} | changes)


def test_free_texts_are_kept_as_they_are(tmp_path: Path) -> None:
    content: list[tuple[object, object]] = [(f"text {n}", f" {n} words\n") for n in range(20)]
    prepared = prepare(free_text({"path": write(tmp_path / "a.jsonl", content)}), tmp_path)
    assert sorted(chain(*read(prepared).values())) == sorted(content)
    assert (prepared.labels, prepared.left_out) == ({s: {} for s in SPLITS}, {})


@pytest.mark.parametrize("seed", range(5))
def test_several_texts_for_one_input_stay_together(seed: int, tmp_path: Path) -> None:
    content: list[tuple[object, object]] = [(f"text {n % 9}", f"answer {n % 27}") for n in range(54)]
    path = write(tmp_path / "a.jsonl", content)
    prepared = prepare(free_text({"path": path}, seed=seed), tmp_path)
    splits = {s: {text for text, _ in found} for s, found in read(prepared).items()}
    assert not splits["test"] & splits["validation"]
    assert not (splits["test"] | splits["validation"]) & splits["train"]
    # Three answers for every input: the fourth test row has two others, which go nowhere.
    assert prepared.sizes == {"train": 18, "validation": 3, "test": 4}
    assert prepared.left_out == {"duplicate": 27, "stands in two splits": 2}


def test_rows_of_few_inputs_cannot_be_carved(tmp_path: Path) -> None:
    content: list[tuple[object, object]] = [(f"text {n % 7}", f"answer {n}") for n in range(54)]
    spec = free_text({"path": write(tmp_path / "a.jsonl", content)})
    with pytest.raises(UserError, match="with a training row that takes 8 rows, and 7 are available"):
        prepare(spec, tmp_path)


@pytest.mark.parametrize("empty", ["", " \n", None])
def test_an_empty_text_is_refused_with_its_place(empty: object, tmp_path: Path) -> None:
    spec = free_text({"path": write(tmp_path / "a.jsonl", [*rows(12), ("x", empty)])})
    with pytest.raises(UserError, match=r"a\.jsonl:13: column 'label' is empty, and there is no text to learn"):
        prepare(spec, tmp_path)


MISTAKES: list[tuple[list[tuple[object, object]], dict[str, Any], str]] = [
    (rows(12), {"template": "{body}"}, r"a\.jsonl:1: no column 'body', which template names; found 'text', 'label'"),
    (
        rows(12),
        {"labels": {"kind": "column", "field": "stars", "words": WORDS}},
        r"a\.jsonl:1: no column 'stars', which labels\.field names",
    ),
    ([*rows(12), ("x", "fair")], {}, r"a\.jsonl:13: unknown label 'fair' in column 'label'; .* 'good', 'bad'"),
    ([*rows(12), (["x"], "good")], {}, r"a\.jsonl:13: column 'text' must hold text or a number, found list"),
    ([*rows(12), ("\ud800", "good")], {}, r"a\.jsonl:13: column 'text' holds half of a surrogate pair"),
    (
        rows(12),
        {"labels": load_experiment(DEFAULT).labels.model_dump(mode="json") | {"field": "label"}},
        r"a\.jsonl:1: column 'label' must hold a number, found 'bad'",
    ),
    (rows(12), {"template": "{text} {label}"}, r"template: \{label\} is the column that the labels are read from"),
    (rows(8), {}, r"splits\.test=4 and splits\.validation=3 cannot be carved: .* takes 9 rows, and 8 are available"),
    ([(" ", "good")], {}, r"splits\.train: no usable row .* 1 empty input"),
    ([(f"text {n}", "good") for n in range(12)], {}, r"splits\.train: none of the 5 .* has the label 'bad'"),
]


@pytest.mark.parametrize(("content", "changes", "told"), MISTAKES)
def test_a_mistake_is_told_with_its_place(
    content: list[tuple[object, object]], changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    spec = experiment({"path": write(tmp_path / "a.jsonl", content)}, **changes)
    with pytest.raises(UserError, match=told):
        prepare(spec, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_named_split_that_is_empty_is_told(tmp_path: Path, split: str) -> None:
    named = {s: write(tmp_path / f"{s}.jsonl", rows(20, s)) for s in SPLITS}
    (tmp_path / f"{split}.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=rf"{split}\.jsonl: the file is empty"):
        prepare(experiment(named), tmp_path / "cache")
    write(tmp_path / f"{split}.jsonl", [(" ", "good")] * 3)
    told = rf"splits\.{split}: no usable row is left for the {split} split; left out: 3 empty input"
    with pytest.raises(UserError, match=told):
        prepare(experiment(named), tmp_path / "cache")


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.csv: cannot be read"):
        prepare(experiment({"path": str(tmp_path / "absent.csv")}), tmp_path)


def test_a_folder_that_holds_nothing_prepared_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no prepared data"):
        load_prepared(tmp_path)


def test_numbers_become_text(tmp_path: Path) -> None:
    content: list[tuple[object, object]] = [(n + 0.5 if n % 3 else n, "good" if n % 2 else "bad") for n in range(12)]
    texts = {
        text
        for split in read(prepare(experiment({"path": write(tmp_path / "a.jsonl", content)}), tmp_path)).values()
        for text, _ in split
    }
    assert texts == {str(value) for value, _ in content}


@pytest.mark.real
def test_the_default_data_is_what_the_scores_were_measured_on(tmp_path: Path) -> None:
    prepared = prepare(load_experiment(DEFAULT), tmp_path)
    assert prepared.sizes == {"train": 8470, "validation": 400, "test": 1200}
    assert prepared.left_out == {"no label": 533, "duplicate": 2}
    assert prepared.digest == "eac48d8fc8d310df1c601cfa4c85ee38a287256a7673c8cd1154febd7006bc13"
