"""A trial on disk: its state as it goes, the last two of them, and its end.

A checkpoint is one safetensors file, whose name carries its hash. It is written beside its place, synced and moved in,
so that at every moment a whole one is there. Whoever wrote what is read is not trusted: what is torn, or of another
trial, is told and not used. No pickle is written or read.
"""

import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from softprompt.history import Outcome
from softprompt.packages import file_sha256, writing_below
from softprompt.progress import watcher
from softprompt.prompt import SoftPrompt

if TYPE_CHECKING:
    from softprompt.workbench import Workbench

FORMAT = "1"
"""Version of the files; another one is refused."""
PROMPT, END = "prompt", "end.json"
_NAME = re.compile(r"[0-9]{8,12}-[0-9a-f]{32}\.safetensors")
_DRAFT = ".draft-"
"""How the names of files that are being written begin."""
_LARGEST, _LARGEST_HEADER, _LARGEST_END = 1 << 32, 1 << 20, 1 << 20
"""Bytes that are read."""


@dataclass(frozen=True)
class State:
    """Everything that a process needs to go on with a trial."""

    tensors: dict[str, Tensor]
    """On the CPU."""
    meta: dict[str, Any]
    """Plain JSON with finite numbers."""


class Ending(BaseModel):
    """How a trial ended."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    outcome: Outcome
    reason: str
    score: float | None
    """Best score on the validation split."""
    val_loss: float | None
    """Loss there of the prompt with that score."""
    steps: NonNegativeInt
    seconds: float


class _Closed(BaseModel):
    """What `end.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: dict[str, str]
    prompt: bool
    """Whether a prompt stands beside it."""
    ending: Ending


def identity_of(bench: "Workbench", study: str, number: int) -> dict[str, str]:
    """What a checkpoint belongs to: a trial of a study, and all that decides what it computes."""
    return {
        "experiment": bench.experiment.fingerprint,
        "data": bench.data.digest,
        "weights": bench.backbone.weights_sha256,
        "tokenizer": bench.backbone.tokenizer_sha256,
        "study": study,
        "trial": str(number),
    }


class Checkpoints:
    """The folder of one trial.

    Args:
        folder: made with the first save.
        identity: what the trial is; a checkpoint with another one is refused.
    """

    def __init__(self, folder: Path, identity: dict[str, str]) -> None:
        self.folder = folder
        self._identity = identity
        self._newest: Path | None = None
        """The newest whole one."""
        self._sequence: int | None = None
        """The greatest of the whole ones, 0 without; None before it was looked for."""
        self._failing = False
        """Whether the last save failed, and that has been told."""

    def save(self, step: int, state: State) -> Path | None:
        """Write the state after some steps; the one before is kept, older ones are removed.

        Returns the file. Where the disk refuses, it is told once, the earlier ones stay, and None is returned: the
        trial can go on.
        """
        try:
            if self._sequence is None:
                self.load()
            sequence = 1 + (self._sequence or 0)
            content = save(state.tensors, self._header(sequence, state.meta))
            target = self.folder / f"{step:08d}-{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_drafts()
            _write(target, content)
        except OSError as error:
            self._tell_failure(error)
            return None
        if self._failing:
            watcher().stage(f"{self.folder}: checkpoints are saved again")
        self._failing = False
        self._remove_all_but({target, self._newest})
        self._newest, self._sequence = target, sequence
        return target

    def load(self, accept: Callable[[State], None] = lambda state: None) -> State | None:
        """The newest whole state of this trial; None where there is none.

        Args:
            accept: called with it, as `Tuning.restore`; where it raises ValueError, the state is refused as a torn
                one is.

        Raises OSError where the folder is there and cannot be listed.
        """
        found = sorted(self._read_all(), key=lambda one: one[0], reverse=True)
        self._newest, self._sequence = None, found[0][0] if found else 0
        for _, file, state in found:
            try:
                accept(state)
            except ValueError as error:
                _tell_refusal(file, error)
            else:
                self._newest = file
                return state
        return None

    def files(self) -> list[Path]:
        """The checkpoints that are there, whole or not, by step."""
        return sorted(file for file in _entries(self.folder) if _NAME.fullmatch(file.name))

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._newest, self._sequence = None, 0

    def close(self, ending: Ending, prompt: SoftPrompt | None) -> Ending:
        """Write how the trial ended; from the moment that `ending` tells it, its prompt is whole on disk.

        An ending that is there already stays. Returns the one that stands.
        Raises UserError where nothing can be written; it may be tried again.
        """
        if (stands := self.ending) is not None:
            return stands
        with writing_below(self.folder, "set SOFTPROMPT_CHECKPOINTS to another folder"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_drafts()
            if prompt is not None:
                _sync_tree(prompt.save(self.folder / PROMPT))
            closed = _Closed(identity=self._identity, prompt=prompt is not None, ending=ending)
            _write(self.folder / END, closed.model_dump_json().encode())
        return ending

    @property
    def ending(self) -> Ending | None:
        """How the trial ended; None where it has not, or nothing that can be read says so."""
        closed = self._closed
        return closed.ending if closed else None

    @property
    def prompt_folder(self) -> Path | None:
        """The prompt of a trial that has ended; None where it has not, or left none."""
        closed = self._closed
        return self.folder / PROMPT if closed and closed.prompt else None

    @property
    def _closed(self) -> _Closed | None:
        file = self.folder / END
        if not file.is_file():
            return None
        try:
            _require_file(file, _LARGEST_END)
            closed = _Closed.model_validate_json(file.read_bytes())
            self._require_own(closed.identity)
        except (ValueError, OSError) as error:
            _tell_refusal(file, error)
            return None
        return closed

    def _header(self, sequence: int, meta: dict[str, Any]) -> dict[str, str]:
        parts = {"identity": self._identity, "sequence": sequence, "meta": meta}
        return {"format": FORMAT, **{name: json.dumps(part, allow_nan=False) for name, part in parts.items()}}

    def _read_all(self) -> Iterator[tuple[int, Path, State]]:
        for file in self.files():
            try:
                yield self._read(file)
            except (ValueError, OSError, SafetensorError, RecursionError) as error:
                _tell_refusal(file, error)

    def _read(self, file: Path) -> tuple[int, Path, State]:
        """Sequence, file and state; ValueError says what is wrong with it."""
        _require_file(file, _LARGEST)
        found, told = file_sha256(file), file.stem.partition("-")[2]
        if not found.startswith(told):
            raise ValueError(f"it is torn, its sha256 begins with {found[: len(told)]} and not as its name says")
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
        if size > _LARGEST_HEADER:
            raise ValueError(f"its header has {size} bytes, and {_LARGEST_HEADER} are the most")
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"it is of format {header.get('format')!r:.80}, this version reads format {FORMAT!r}")
            identity, sequence, meta = (_parse(header.get(name)) for name in ("identity", "sequence", "meta"))
            self._require_own(identity)
            if type(sequence) is not int or type(meta) is not dict:
                raise ValueError("its header has no whole number as sequence, or no object as meta")
            names = list(opened.keys())
            # Copies: what is read is mapped to the file, which holds its place on disk for as long.
            return sequence, file, State({name: opened.get_tensor(name).clone() for name in names}, meta)

    def _require_own(self, identity: Any) -> None:
        if type(identity) is not dict:
            raise ValueError(f"its identity must be an object, found {identity!r:.80}")
        for key in sorted(self._identity.keys() | identity.keys()):
            there, here = identity.get(key), self._identity.get(key)
            if there != here:
                raise ValueError(f"it is of another trial, {key!r:.80} is {there!r:.80} there and {here!r:.80} here")

    def _tell_failure(self, error: OSError) -> None:
        if not self._failing:
            watcher().stage(
                f"{self.folder}: no checkpoint can be saved ({error.strerror or error}), the trial goes on; free up "
                "the disk: until then an interruption costs the steps since the last one"
            )
        self._failing = True

    def _remove_drafts(self) -> None:
        """What processes that were killed have left."""
        for file in _entries(self.folder):
            if file.name.startswith(_DRAFT):
                file.unlink(missing_ok=True)
            elif file.name.startswith((".softprompt-", ".old-")):  # a prompt's
                shutil.rmtree(file, ignore_errors=True)

    def _remove_all_but(self, kept: set[Path | None]) -> None:
        for file in self.files():
            if file not in kept:
                with suppress(OSError):  # it would be removed at the next save
                    file.unlink()


def _tell_refusal(file: Path, error: Exception) -> None:
    """One line for a file that is not used."""
    why = str(error)
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        why = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    watcher().stage(f"{file}: is not used, {' '.join(why.split())[:400]}")


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _require_file(file: Path, largest: int) -> None:
    found = file.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no plain file")
    if found.st_size > largest:
        raise ValueError(f"it has {found.st_size} bytes, and {largest} are the most")


def _parse(text: str | None) -> Any:
    """JSON of finite numbers."""
    if text is None:
        raise ValueError("its header lacks a part")
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"its header has the number {text:.80}, which is not finite")
    return number


def _write(target: Path, content: bytes) -> None:
    """A file that is whole and on disk when it appears; OSError leaves nothing behind."""
    draft = target.with_name(f"{_DRAFT}{uuid4().hex}")
    try:
        with draft.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    finally:
        with suppress(OSError):
            draft.unlink()
    _sync(target.parent)


def _sync_tree(folder: Path) -> None:
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
