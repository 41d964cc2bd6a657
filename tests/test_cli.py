"""The command as a person meets it: real processes, exit codes, and what they say."""

import errno
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from flows.cli import _explain, app
from softprompt.backbone import hash_folder
from softprompt.home import state_home
from tests.test_prompt import make_prompt
from tests.tiny import tiny_experiment, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
DEFAULT = ROOT / "experiments" / "movie-sentiment.yaml"
COMMAND = [sys.executable, "-c", "from flows.cli import main; main()"]


def call(*arguments: object, **environment: object) -> Any:
    """The command within this process: quick, for what does not get as far as Prefect."""
    return CliRunner().invoke(app, [*map(str, arguments)], env={k: str(v) for k, v in environment.items()})


def run(*arguments: object, **environment: object) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env={**os.environ, **{k: str(v) for k, v in environment.items()}},
        capture_output=True,
        text=True,
        timeout=170,
    )


def sentence(result: Any, code: int = 2) -> str:
    found = result.returncode if isinstance(result, subprocess.CompletedProcess) else result.exit_code
    assert found == code, result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("softprompt: ")
    return str(lines[0])


def test_help_names_every_command():
    shown = run("--help").stdout
    assert all(name in shown for name in ("sweep", "retune", "tune", "evaluate", "predict", "device", "ui"))


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("search.lenght=3", ["search.lenght", "no such key"]),
        ("training.steps=0", ["training.steps", "greater than or equal to 1", "0"]),
        ("search.length={low: 9, high: 3}", ["search.length", "low <= high", "low=9, high=3"]),
        ("labels.field=stars", ["stars", "labels.field", "text"]),
        ("template='{txt}'", ["txt", "template"]),
        ("splits.test=100000", ["splits.test", "100000"]),
        ("execution.device=cuda:7", ["device", "cuda:7"]),
        ("data.path=nowhere.csv", ["nowhere.csv"]),
        ("model.path=nowhere", ["model.path", "nowhere"]),
        ("nonsense", ["nonsense", "dotted.key=value"]),
    ],
)
def test_a_mistake_ends_with_one_sentence_and_nothing_written(tmp_path: Path, override: str, parts: list[str]):
    file = write_experiment(tmp_path)
    home = tmp_path / "home"
    said = sentence(call("sweep", file, "--dry-run", "--set", override, SOFTPROMPT_HOME=home))
    assert all(part in said for part in parts), said
    assert not home.exists()


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("template='{txt}'", "no column 'txt'"),
        ("template='Is this a good film or a bad one? {text}'", "the template alone takes"),
    ],
)
def test_a_mistake_that_a_flow_finds_leaves_no_study_and_no_run(tmp_path: Path, override: str, part: str):
    home = tmp_path / "home"
    limit = ("--set", "training.max_tokens=8")
    assert part in sentence(run("sweep", write_experiment(tmp_path), *limit, "--set", override, SOFTPROMPT_HOME=home))
    assert not (home / "artifacts").exists()
    for name, table in (("optuna.db", "studies"), ("mlflow.db", "runs")):
        if (home / name).exists():
            with closing(sqlite3.connect(home / name)) as database:
                assert database.execute(f"select * from {table}").fetchall() == []


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("latin.csv", "text,label\ncafé,positive\n".encode("latin-1"), ["latin.csv", "UTF-8", "2"]),
        ("broken.csv", b"text,label\nfine,positive,more\n", ["broken.csv:2"]),
        ("broken.jsonl", b'{"text": "a", "label": "positive"}\n{"text": \n', ["broken.jsonl:2"]),
        ("other.csv", b"text,label\nfine,meh\n", ["other.csv:2", "meh", "positive"]),
        ("empty.csv", b"", ["empty.csv"]),
    ],
)
def test_a_broken_file_is_named_with_its_row(tmp_path: Path, name: str, content: bytes, parts: list[str]):
    file = write_experiment(tmp_path)
    (tmp_path / name).write_bytes(content)
    said = sentence(call("sweep", file, "--dry-run", "--set", f"data.path={tmp_path / name}"))
    assert all(part in said for part in parts), said


def test_a_package_that_cannot_be_fetched(tmp_path: Path):
    said = sentence(
        call("sweep", DEFAULT, "--dry-run", SOFTPROMPT_CACHE=tmp_path, PIP_NO_INDEX=1, PIP_FIND_LINKS=tmp_path)
    )
    assert "vaderSentiment==3.3.2" in said


def test_a_package_of_another_hash(tmp_path: Path):
    kept = tmp_path / "packages" / yaml.safe_load(DEFAULT.read_text())["data"]["sha256"]
    kept.mkdir(parents=True)
    (kept / "vaderSentiment-3.3.2.tar.gz").write_bytes(b"something else")
    said = sentence(call("sweep", DEFAULT, "--dry-run", SOFTPROMPT_CACHE=tmp_path))
    assert "vaderSentiment-3.3.2.tar.gz" in said
    assert "5d7c06e0" in said


def test_a_state_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    said = sentence(call("sweep", write_experiment(tmp_path), SOFTPROMPT_HOME=tmp_path / "file" / "home"))
    assert "SOFTPROMPT_HOME" in said


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own, where mounting is allowed."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk(tmp_path: Path):
    with mounted(tmp_path / "small", "size=16k") as small:
        said = sentence(call("sweep", write_experiment(tmp_path), SOFTPROMPT_HOME=small / "home"))
    assert "No space left" in said


@pytest.mark.parametrize("variable", ["SOFTPROMPT_HOME", "SOFTPROMPT_CACHE"])
def test_a_read_only_disk(tmp_path: Path, variable: str):
    with mounted(tmp_path / "fixed", "ro,size=16k") as fixed:
        said = sentence(call("sweep", write_experiment(tmp_path), **{variable: fixed / "own"}))
    assert f"{fixed / 'own'}: cannot be written (Read-only file system)" in said
    assert variable in said


def test_answers_that_find_no_room_are_told_with_their_folder(tmp_path: Path):
    prompt = save_prompt(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n' * 400)
    with mounted(tmp_path / "small", "size=4k") as small:
        said = sentence(run("predict", "--prompt", prompt, "--file", tmp_path / "rows.jsonl", "--out", small / "a.csv"))
        assert not list(small.iterdir())
    assert f"{small}: cannot be written (No space left on device)" in said


def test_an_error_of_the_disk_names_what_could_not_be_written(tmp_path: Path):
    file = tmp_path / "elsewhere" / "file"
    said = _explain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)))
    assert str(file) in said
    assert str(state_home()) not in said
    assert str(state_home()) in _explain(RuntimeError("database or disk is full"))


def test_dry_run_tells_the_plan_and_trains_nothing(tmp_path: Path):
    home = tmp_path / "home"
    result = call("sweep", write_experiment(tmp_path), "--dry-run", SOFTPROMPT_HOME=home)
    assert result.exit_code == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        *("experiment", "model", "composition", "data", "search", "budget", "slots", "memory", "trial", "cost")
    ]
    assert not home.exists()


def test_device_measures_and_writes_nothing(tmp_path: Path):
    home = tmp_path / "home"
    file = write_experiment(tmp_path)
    alone = call("device", "--device", "cpu", SOFTPROMPT_HOME=home)
    assert alone.exit_code == 0, alone.output
    assert [line.split("  ")[0] for line in alone.stdout.splitlines()] == [
        "device",
        "memory",
        "versions",
        "matmul peak",
    ]
    found = json.loads(call("device", file, "--json", SOFTPROMPT_HOME=home).stdout)
    assert found["device"] == "cpu"
    assert found["model"]["composition"] == "shared prefix, layers written out"
    assert found["model"]["choice"] == {
        "slots": 1,
        "why": "as on a CPU more gain little and every score comes later",
        "rates": {},
    }
    assert not home.exists()
    assert "--set" in sentence(call("device", "--set", "seed=1"))


def test_dry_run_of_the_other_commands(tmp_path: Path):
    home, file = tmp_path / "home", write_experiment(tmp_path)
    tuned = call("tune", file, "--dry-run", SOFTPROMPT_HOME=home)
    assert tuned.exit_code == 0, tuned.stderr
    assert "1 trial\n" in tuned.stdout
    evaluated = call("evaluate", file, "--dry-run", SOFTPROMPT_HOME=home)
    assert evaluated.exit_code == 0, evaluated.stderr
    assert "nothing is trained" in evaluated.stdout
    retuned = call("retune", file, "--dry-run", SOFTPROMPT_HOME=home)
    assert retuned.exit_code == 0, retuned.stderr
    assert retuned.stdout.startswith("retune       a sweep, as there is no champion yet\nexperiment ")
    assert not home.exists()


def test_tune_keeps_its_prompt_in_a_folder(tmp_path: Path):
    home, file, out = {"SOFTPROMPT_HOME": tmp_path / "home"}, write_experiment(tmp_path), tmp_path / "kept"
    tuned = run("tune", file, "--out", out, "--set", "training.steps=3", **home)
    assert tuned.returncode == 0, tuned.stderr
    assert f"predict --prompt {out}" in tuned.stdout
    assert (out / "adapter_model.safetensors").is_file()
    assert "exists already" in sentence(call("tune", file, "--out", out))
    assert call("predict", "a film", "--prompt", out, SOFTPROMPT_HOME=tmp_path / "other").exit_code == 0
    assert not (tmp_path / "other").exists()


def test_sweep_then_predict(tmp_path: Path):
    home = {"SOFTPROMPT_HOME": tmp_path / "home"}
    swept = run("sweep", write_experiment(tmp_path), "--set", "budget.trials=2", **home)
    assert swept.returncode == 0, swept.stderr
    assert swept.stderr == ""
    assert "is the new champion" in swept.stdout
    assert f"MLFLOW_TRACKING_URI=sqlite:///{tmp_path}/home/mlflow.db mlflow models serve" in swept.stdout
    assert "trial 1" in swept.stdout

    said = run("predict", "a good one", "a bad one", **home)
    assert said.returncode == 0, said.stderr
    header, *rows = said.stdout.splitlines()
    assert header == "text,label,p(negative),p(positive)"
    assert len(rows) == 2

    out = tmp_path / "answers.csv"
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n{"text": "bad"}\n')
    written = run("predict", "--file", tmp_path / "rows.jsonl", "--out", out, **home)
    assert written.returncode == 0, written.stderr
    assert len(out.read_text().splitlines()) == 3

    (tmp_path / "wrong.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    failed = run("predict", "--file", tmp_path / "wrong.jsonl", "--out", tmp_path / "none.csv", **home)
    assert "wrong.jsonl:2" in sentence(failed)
    assert not (tmp_path / "none.csv").exists()

    assert "no such registered prompt" in sentence(run("predict", "x", "--version", "9", **home))

    retuned = run("retune", tmp_path / "experiment.yaml", **home)
    assert (retuned.returncode, retuned.stderr) == (0, "")
    assert "nothing new: the rows are those of champion v1" in retuned.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ('{"text": ["a", "list"]}', ["rows.jsonl:1", "column 'text' must hold text or a number, found list"]),
        ('{"text": "half \\ud800"}', ["rows.jsonl:1", "half of a surrogate pair"]),
        ('{"text": null}', ["rows.jsonl:1", "column 'text' is missing"]),
    ],
)
def test_a_row_that_cannot_be_labelled_is_named(tmp_path: Path, row: str, parts: list[str]):
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    said = sentence(call("predict", "--prompt", save_prompt(tmp_path), "--file", tmp_path / "rows.jsonl"))
    assert all(part in said for part in parts), said


def test_answers_are_not_written_over_a_folder(tmp_path: Path):
    (tmp_path / "answers").mkdir()
    said = sentence(call("predict", "good", "--prompt", save_prompt(tmp_path), "--out", tmp_path / "answers"))
    assert "answers: is a folder; name a file" in said


def save_prompt(folder: Path) -> Path:
    """A prompt whose base model lies beside it."""
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    base = {"kind": "local", "path": str(folder / "model")}
    weights = hash_folder(folder / "model")
    return make_prompt(base=base, weights_sha256=weights).save(folder / "prompt")


def test_predict_without_anything_registered(tmp_path: Path):
    home = tmp_path / "home"
    assert "run a sweep first" in sentence(run("predict", "a text", SOFTPROMPT_HOME=home))
    assert not home.exists()


@pytest.mark.parametrize("command", ["sweep", "tune", "evaluate"])
def test_a_tracking_server_that_is_away_is_told_at_once(tmp_path: Path, command: str, free_port: int):
    home, uri = tmp_path / "home", f"http://me:secret@127.0.0.1:{free_port}"
    said = sentence(call(command, write_experiment(tmp_path), SOFTPROMPT_HOME=home, MLFLOW_TRACKING_URI=uri))
    assert f"http://127.0.0.1:{free_port} does not answer" in said
    assert "does not answer" in sentence(call("predict", "a film", SOFTPROMPT_HOME=home, MLFLOW_TRACKING_URI=uri))
    assert not home.exists()


@pytest.mark.parametrize("option", ["--mlflow-port", "--prefect-port", "--optuna-port"])
def test_a_port_out_of_range_is_refused(option: str):
    refused = call("ui", option, 70000)
    assert refused.exit_code == 2
    assert option in refused.stderr


def write_experiment(folder: Path) -> Path:
    experiment = tiny_experiment(folder)
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment.model_dump(mode="json")))
    return file
