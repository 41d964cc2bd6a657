"""The folder of a trial: whole at every moment, and nothing that is read is trusted."""

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from softprompt.checkpoint import Checkpoints, Ending, State, identity_of
from softprompt.data import prepare
from softprompt.errors import UserError
from softprompt.history import Entry, pack
from softprompt.progress import watched_by
from softprompt.prompt import SoftPrompt
from softprompt.training import Slot
from softprompt.workbench import Workbench
from tests.slots import draw_examples, make_settings
from tests.tiny import tiny_experiment
from tests.told import Told

IDENTITY = {"experiment": "e1", "data": "d1", "weights": "w1", "tokenizer": "t1", "study": "s1", "trial": "3"}
ENDING = Ending(outcome="finished", reason="", score=0.875, val_loss=0.25, steps=12, seconds=3.5)
FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
"""Python 3.12, of a child that does nothing but write files."""


@pytest.fixture
def told() -> Iterator[list[str]]:
    watcher = Told()
    with watched_by(watcher):
        yield watcher.lines


def make_state(step: int) -> State:
    numbers = torch.Generator().manual_seed(step)
    return State({"prompt": torch.randn(4, 32, generator=numbers), "step": torch.tensor(step)}, {"seconds": 0.5 * step})


def opened(folder: Path, **changes: str) -> Checkpoints:
    return Checkpoints(folder / "trial", IDENTITY | changes)


def require_state(found: State | None, step: int) -> None:
    expected = make_state(step)
    assert found is not None
    assert found.meta == expected.meta
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def saved(folder: Path, *steps: int) -> Checkpoints:
    checkpoints = opened(folder)
    for step in steps:
        assert checkpoints.save(step, make_state(step)) is not None
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "trial").iterdir())


def test_the_newest_state_is_read_by_whoever_opens_the_folder(tmp_path: Path) -> None:
    saved(tmp_path, 3, 6, 9)
    require_state(opened(tmp_path).load(), 9)


def test_the_last_two_are_kept_under_step_and_hash(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 3, 6, 9)
    assert [file.name[:9] for file in checkpoints.files()] == ["00000006-", "00000009-"]
    assert names(tmp_path) == [file.name for file in checkpoints.files()]
    for file in checkpoints.files():
        assert hashlib.sha256(file.read_bytes()).hexdigest()[:32] == file.stem[9:]


def test_without_a_folder_there_is_nothing(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path)
    assert checkpoints.load() is None
    assert checkpoints.files() == []
    assert checkpoints.ending is None
    assert checkpoints.prompt_folder is None
    checkpoints.remove()
    assert not list(tmp_path.iterdir())


def test_of_two_at_one_step_the_later_is_read(tmp_path: Path) -> None:
    """As before the validation of a rung, and after it."""
    for n in range(6):
        opened(tmp_path).save(6, make_state(n))
        assert len(opened(tmp_path).files()) == min(n + 1, 2)
        require_state(opened(tmp_path).load(), n)


def test_a_trial_that_begins_anew_does_not_go_back_to_what_was_later(tmp_path: Path) -> None:
    saved(tmp_path, 90, 120)
    saved(tmp_path, 3)
    require_state(opened(tmp_path).load(), 3)
    assert [file.name[:9] for file in opened(tmp_path).files()] == ["00000003-", "00000120-"]


def test_a_torn_one_is_told_and_the_one_before_is_used(tmp_path: Path, told: list[str]) -> None:
    last = saved(tmp_path, 3, 6).files()[-1]
    last.write_bytes(last.read_bytes()[:-1])
    checkpoints = opened(tmp_path)
    require_state(checkpoints.load(), 3)
    assert len(told) == 1
    assert told[0].startswith(f"{last}: is not used, it is torn, its sha256 begins with ")
    checkpoints.save(4, make_state(4))
    assert [file.name[:9] for file in checkpoints.files()] == ["00000003-", "00000004-"]
    require_state(opened(tmp_path).load(), 4)
    assert len(told) == 1


def test_where_all_are_torn_there_is_none(tmp_path: Path, told: list[str]) -> None:
    for file in saved(tmp_path, 3, 6).files():
        file.write_bytes(b"")
    assert opened(tmp_path).load() is None
    assert len(told) == 2
    saved(tmp_path, 1)
    require_state(opened(tmp_path).load(), 1)
    assert len(opened(tmp_path).files()) == 1


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_byte_is_changed_it_is_not_used(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("flip")
    file = saved(folder, 3).files()[0]
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    with watched_by(Told()) as _:
        assert opened(folder).load() is None


@pytest.mark.parametrize("key", IDENTITY)
def test_one_of_another_trial_is_told_with_both_values(tmp_path: Path, told: list[str], key: str) -> None:
    file = saved(tmp_path, 3).files()[0]
    assert opened(tmp_path, **{key: "other"}).load() is None
    assert told == [f"{file}: is not used, it is of another trial, {key!r} is {IDENTITY[key]!r} there and 'other' here"]


def test_the_identity_tells_all_that_decides_what_a_trial_computes(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path)
    bench = Workbench(experiment, prepare(experiment, tmp_path / "cache"))
    identity = identity_of(bench, "tiny-1", 3)
    assert identity.keys() == IDENTITY.keys()
    assert (identity["study"], identity["trial"]) == ("tiny-1", "3")
    other = tiny_experiment(tmp_path, budget={"trials": 9})
    again = identity_of(Workbench(other, prepare(other, tmp_path / "cache"), bench.backbone), "tiny-1", 3)
    assert {key for key in identity if identity[key] != again[key]} == {"experiment"}


def test_what_the_trial_cannot_take_is_refused_like_a_torn_one(tmp_path: Path, told: list[str]) -> None:
    files = saved(tmp_path, 3, 6).files()

    def accept(state: State) -> None:
        if state.meta["seconds"] == 3:
            raise ValueError("steps_done must be\nsmaller")

    checkpoints = opened(tmp_path)
    require_state(checkpoints.load(accept), 3)
    assert told == [f"{files[1]}: is not used, steps_done must be smaller"]
    checkpoints.save(4, make_state(4))
    assert len(checkpoints.files()) == 2
    require_state(opened(tmp_path).load(), 4)


# What somebody else may have put there, under its right hash


def plant(folder: Path, content: bytes) -> Path:
    file = folder / "trial" / f"00000009-{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
    file.write_bytes(content)
    return file


def header(**changes: str | None) -> dict[str, str]:
    parts = {"format": "1", "identity": json.dumps(IDENTITY), "sequence": "99", "meta": "{}"} | changes
    return {name: text for name, text in parts.items() if text is not None}


def test_what_is_planted_rightly_is_used(tmp_path: Path) -> None:
    """So that the refusals below are of what they say."""
    saved(tmp_path, 3)
    plant(tmp_path, save({"x": torch.ones(2)}, header()))
    found = opened(tmp_path).load()
    assert found is not None
    assert list(found.tensors) == ["x"]


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        (header(format="2"), "it is of format '2', this version reads format '1'"),
        (header(format=None), "it is of format None"),
        (header(identity=None), "its header lacks a part"),
        (header(meta=None), "its header lacks a part"),
        (header(identity="[]"), r"its identity must be an object, found \[\]"),
        (header(identity=json.dumps(IDENTITY | {"trial": 3})), "'trial' is 3 there and '3' here"),
        (header(identity=json.dumps(IDENTITY | {"more": "\ud800"})), r"'more' is '\\ud800' there and None here"),
        (header(sequence="true"), "its header has no whole number as sequence"),
        (header(sequence="1e3"), "its header has no whole number as sequence"),
        (header(meta="[]"), "no object as meta"),
        (header(meta='{"seconds": NaN}'), "the number NaN, which is not finite"),
        (header(meta='{"seconds": -Infinity}'), "the number -Infinity, which is not finite"),
        (header(meta='{"seconds": 1e999}'), "the number 1e999, which is not finite"),
        (header(meta="{"), "Expecting property name"),
        (header(meta="[" * 100_000), "recursion"),
        (header(meta="9" * 10_000), "digits"),
        (header(meta=json.dumps("x" * (1 << 20))), "its header has [0-9]+ bytes, and 1048576 are the most"),
    ],
)
def test_a_header_that_is_wrong_is_told(tmp_path: Path, told: list[str], metadata: dict[str, str], why: str) -> None:
    saved(tmp_path, 3)
    file = plant(tmp_path, save({"x": torch.ones(2)}, metadata))
    require_state(opened(tmp_path).load(), 3)
    assert len(told) == 1
    assert told[0].startswith(f"{file}: is not used, ")
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(told[0])


class Trap:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch trapped",)


def safetensors(head: bytes, body: bytes = b"", size: int | None = None) -> bytes:
    return (len(head) if size is None else size).to_bytes(8, "little") + head + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        pickle.dumps(Trap()),
        safetensors(b"{}", size=1 << 62),
        safetensors(b"{}", size=1 << 19),
        safetensors(b'{"x":{"dtype":"F32","shape":[4000000000,4000000000],"data_offsets":[0,4]}}', bytes(4)),
        safetensors(b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,400000000000]}}', bytes(4)),
        safetensors(b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(8)),
        safetensors(b"[" * 1000),
    ],
    ids=["empty", "a byte", "pickle", "huge header", "long header", "huge shape", "beyond", "more", "nested"],
)
def test_what_is_no_checkpoint_is_told(
    tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, 3)
    plant(tmp_path, content)
    require_state(opened(tmp_path).load(), 3)
    assert len(told) == 1
    assert not (tmp_path / "trapped").exists()


def test_what_is_no_plain_file_or_huge_is_told(tmp_path: Path, told: list[str]) -> None:
    files = saved(tmp_path, 3, 6).files()
    folder = tmp_path / "trial"
    odd = [folder / f"0000000{n}-{'0' * 32}.safetensors" for n in range(4)]
    odd[0].symlink_to(files[0])
    odd[1].mkdir()
    os.mkfifo(odd[2])
    with odd[3].open("wb") as file:
        file.truncate((1 << 32) + 1)
    require_state(opened(tmp_path).load(), 6)
    assert [line.partition(": ")[2] for line in told] == [
        *["is not used, it is no plain file"] * 3,
        "is not used, it has 4294967297 bytes, and 4294967296 are the most",
    ]


# A disk that refuses


def test_a_file_that_may_not_grow_costs_a_save_and_not_the_trial(tmp_path: Path) -> None:
    script = f"""
import resource
from pathlib import Path
from softprompt.progress import watched_by
from tests.test_checkpoint import make_state, names, opened, require_state
from tests.told import Told
folder = Path({str(tmp_path)!r})
checkpoints, told = opened(folder), Told()
with watched_by(told):
    for step in (3, 6):
        assert checkpoints.save(step, make_state(step))
    before = names(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
    for step in (9, 12):
        assert checkpoints.save(step, make_state(step)) is None
        assert names(folder) == before
    require_state(opened(folder).load(), 6)
    print(*told.lines, sep="\\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert checkpoints.save(15, make_state(15))
    require_state(opened(folder).load(), 15)
    print(*told.lines[1:], sep="\\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
    checkpoints.save(18, make_state(18))
    assert len(told.lines) == 3
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{tmp_path}/trial: no checkpoint can be saved (File too large), the trial goes on; free up the disk: "
        "until then an interruption costs the steps since the last one",
        f"{tmp_path}/trial: checkpoints are saved again",
    ]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None:
        pytest.skip("there is no mount")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs may be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_costs_saves_and_not_the_trial(small_disk: Path, told: list[str]) -> None:
    checkpoints = saved(small_disk, 3, 6)
    before = names(small_disk)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(1 << 20))
    for step in (9, 12):
        assert checkpoints.save(step, make_state(step)) is None
        assert names(small_disk) == before
    with pytest.raises(UserError, match=r"cannot be written \(.*No space left on device.*\); free it up or"):
        checkpoints.close(ENDING, make_prompt())
    assert names(small_disk) == before
    assert checkpoints.ending is None
    require_state(opened(small_disk).load(), 6)
    assert len(told) == 1
    assert "(No space left on device)" in told[0]
    filler.unlink()
    checkpoints.save(15, make_state(15))
    require_state(opened(small_disk).load(), 15)
    assert told[1:] == [f"{small_disk}/trial: checkpoints are saved again"]
    assert checkpoints.close(ENDING, make_prompt()) == opened(small_disk).ending == ENDING


def test_a_folder_that_is_a_file_is_told(tmp_path: Path, told: list[str]) -> None:
    (tmp_path / "trial").write_text("")
    assert opened(tmp_path).save(3, make_state(3)) is None
    assert len(told) == 1


# Death


def test_what_a_killed_process_left_is_removed_at_the_next_save(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 3)
    (tmp_path / "trial" / ".draft-0123").write_bytes(b"half")
    (tmp_path / "trial" / ".softprompt-xyz").mkdir()
    require_state(opened(tmp_path).load(), 3)
    checkpoints.save(6, make_state(6))
    assert names(tmp_path) == [file.name for file in checkpoints.files()]


def fork(run: Callable[[], object]) -> int:
    """A child that does this and ends; its id."""
    child = os.fork()
    if child:
        return child
    try:
        run()
        os._exit(0)
    finally:
        os._exit(1)


@FORKS
def test_killed_at_any_instant_a_whole_state_is_there(tmp_path: Path) -> None:
    """50 children save as fast as they can, one after the other on one trial."""
    draw, confirmed = random.Random(0), 0
    for _ in range(50):
        reading, writing = os.pipe()

        def save_on(begin: int = confirmed, writing: int = writing) -> None:
            checkpoints = opened(tmp_path)
            for step in count(begin + 1):
                assert checkpoints.save(step, make_state(step)) is not None
                os.write(writing, step.to_bytes(8, "little"))

        child = fork(save_on)
        os.close(writing)
        os.read(reading, 8)  # it is at work
        time.sleep(draw.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        with open(reading, "rb") as pipe:
            told = pipe.read()
        found = opened(tmp_path).load()
        assert found is not None
        step = int(found.tensors["step"])
        require_state(found, step)
        confirmed = int.from_bytes(told[-8:], "little") if told else confirmed + 1
        assert step in (confirmed, confirmed + 1)
        assert len(opened(tmp_path).files()) <= 3
        confirmed = step


def kill_at(line: int, run: Callable[[], object]) -> int:
    """Do it in a child that kills itself before the n-th line of the modules that write; how the child ended."""

    def killed() -> None:
        lines = count(1)

        def trace(frame: Any, event: str, argument: Any) -> Any:
            if Path(frame.f_code.co_filename).name not in ("checkpoint.py", "prompt.py", "packages.py"):
                return None
            if event == "line" and next(lines) == line:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        run()
        sys.settrace(None)

    return os.waitpid(fork(killed), 0)[1]


@FORKS
def test_killed_before_any_line_of_a_save_a_whole_state_is_there(tmp_path: Path) -> None:
    saved(tmp_path / "base", 3, 6)
    found = []
    for line in count(1):
        shutil.rmtree(tmp_path / "trial", ignore_errors=True)
        shutil.copytree(tmp_path / "base" / "trial", tmp_path / "trial")
        checkpoints = opened(tmp_path)
        require_state(checkpoints.load(), 6)
        end = kill_at(line, partial(checkpoints.save, 9, make_state(9)))
        state = opened(tmp_path).load()
        assert state is not None
        step = int(state.tensors["step"])
        require_state(state, step)
        found.append(step)
        saved(tmp_path, 12)
        require_state(opened(tmp_path).load(), 12)
        assert len(names(tmp_path)) == 2
        if end == 0:
            break
        assert end == signal.SIGKILL
    assert found == sorted(found)
    assert set(found) == {6, 9}


def make_prompt() -> SoftPrompt:
    vectors = torch.arange(8.0).reshape(2, 4)
    hashes: dict[str, Any] = {"weights_sha256": "0" * 64, "tokenizer_sha256": "1" * 64}
    return SoftPrompt(vectors=vectors, template="{text}", words={"a": " a", "b": " b"}, max_tokens=8, **hashes)


@FORKS
def test_killed_before_any_line_of_the_end_it_is_whole_or_not_there(tmp_path: Path) -> None:
    ended = []
    for line in count(1):
        shutil.rmtree(tmp_path / "trial", ignore_errors=True)
        saved(tmp_path, 6)
        end = kill_at(line, partial(opened(tmp_path).close, ENDING, make_prompt()))
        checkpoints = opened(tmp_path)
        ended.append(checkpoints.ending is not None)
        assert (checkpoints.prompt_folder is not None) == ended[-1]
        if checkpoints.prompt_folder:
            assert torch.equal(SoftPrompt.load(checkpoints.prompt_folder).vectors, make_prompt().vectors)
        assert checkpoints.close(ENDING, make_prompt()) == ENDING
        assert [name for name in names(tmp_path) if not name.startswith("0")] == ["end.json", "prompt"]
        if end == 0:
            break
        assert end == signal.SIGKILL
    assert ended == sorted(ended)
    assert set(ended) == {False, True}


# The end


def test_closing_twice_is_closing_once(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 6)
    assert checkpoints.close(ENDING, make_prompt()) == ENDING
    before = {file: file.read_bytes() for file in (tmp_path / "trial").rglob("*") if file.is_file()}
    other = ENDING.model_copy(update={"outcome": "failed", "seconds": 9.0})
    assert opened(tmp_path).close(other, None) == ENDING
    assert {file: file.read_bytes() for file in (tmp_path / "trial").rglob("*") if file.is_file()} == before
    require_state(opened(tmp_path).load(), 6)


@pytest.mark.parametrize("score", [None, 0.1 + 0.2, float("inf"), -float("inf")])
def test_an_end_without_a_prompt_says_all(tmp_path: Path, score: float | None) -> None:
    ending = Ending(outcome="failed", reason="the loss is nan", score=score, val_loss=score, steps=3, seconds=0.1)
    opened(tmp_path).close(ending, None)
    assert opened(tmp_path).ending == ending
    assert opened(tmp_path).prompt_folder is None


def test_an_end_that_is_torn_is_none_and_can_be_written_anew(tmp_path: Path, told: list[str]) -> None:
    checkpoints = opened(tmp_path)
    checkpoints.close(ENDING, make_prompt())
    file = tmp_path / "trial" / "end.json"
    content = file.read_bytes()
    torn = [content[:length] for length in range(len(content))]
    for broken in [*torn, b"[]", b"[" * 100_000, b"\xff", content.replace(b"finished", b"ended"), content + b"1"]:
        file.write_bytes(broken)
        assert checkpoints.ending is None
        assert checkpoints.prompt_folder is None
        assert told.pop().startswith(f"{file}: is not used, ")
    checkpoints.close(ENDING, make_prompt())
    assert file.read_bytes() == content


def test_the_end_of_another_trial_is_not_this_ones(tmp_path: Path, told: list[str]) -> None:
    opened(tmp_path).close(ENDING, None)
    assert opened(tmp_path, study="s2").ending is None
    assert told[0].endswith("it is of another trial, 'study' is 's1' there and 's2' here")


def test_what_is_removed_is_gone_and_can_begin_anew(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 3, 6)
    checkpoints.close(ENDING, make_prompt())
    checkpoints.remove()
    assert not list(tmp_path.iterdir())
    checkpoints.save(1, make_state(1))
    require_state(checkpoints.load(), 1)


# Size


def test_a_long_prompt_takes_less_than_a_megabyte_apart_from_its_history(tmp_path: Path) -> None:
    """P=100, H=576: vectors, best and two moments are 0.92 MB; each entry of the history is 28 bytes."""
    slot = Slot(torch.zeros(100, 576), draw_examples(), make_settings(), torch.device("cpu"))
    slot.parameterization.parameters[0].grad = torch.ones(100, 576)
    slot.update()
    tensors = slot.state() | {"best": torch.zeros(100, 576)}
    sizes = []
    for steps in (0, 300, 10_000):
        names, columns = pack([Entry("train_loss", 0.5, n, 10**12) for n in range(steps)])
        file = opened(tmp_path).save(steps, State(tensors | columns, {"history": names}))
        assert file is not None
        sizes.append(file.stat().st_size)
    assert sizes[0] < sizes[1] < 1_000_000
    assert sizes[2] - sizes[0] < 29 * 10_000
