"""The prompt that other prompts start from: what a source names is found, verified, and pinned to its exact vectors.

An alias moves and a folder is overwritten, so that every record names the version and the hash that were found.
Refused is what would not start where it says, or what would bring what it has seen of the test rows with it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.errors import UserError
from softprompt.exposure import may_have_seen_test
from softprompt.home import owns_tracking, require_tracking, tracking_file
from softprompt.prompt import SoftPrompt

if TYPE_CHECKING:
    from softprompt.workbench import Workbench

_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
_WHERE = "search.initialization: the source"


@dataclass(frozen=True)
class Source:
    """A prompt to start from, and what it was when it was found."""

    prompt: SoftPrompt
    name: str
    """The registered model, or the folder."""
    version: int | None
    """Its version; None of a folder."""

    @property
    def record(self) -> dict[str, Any]:
        """What tells it from every other, as plain values."""
        return {"name": self.name, "version": self.version, "vectors_sha256": self.prompt.vectors_sha256}

    def __str__(self) -> str:
        """The same for a person."""
        version = "" if self.version is None else f" v{self.version}"
        return f"{self.name}{version}, sha256 {self.prompt.vectors_sha256}"


def open_source(source: str) -> Source:
    """The prompt that a source names now.

    Args:
        source: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or a folder.

    Raises UserError where there is none, or it is damaged.
    """
    if not source.startswith("models:"):
        return Source(SoftPrompt.load(source), str(Path(source)), None)
    found = _REGISTERED.fullmatch(source)
    if found is None:
        raise UserError(
            f"{_WHERE} {source!r} is no registered prompt; write models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    if owns_tracking() and not tracking_file().exists():  # MLflow would make it
        raise UserError(f"{_WHERE} {source} is not there: {tracking_file()} is not made yet; run a sweep first")
    require_tracking()
    from softprompt.registry import load_registered, version_of  # takes seconds, and only this kind needs MLflow

    name, alias = found["name"], found["alias"]
    version = version_of(name, alias) if alias else int(found["version"])
    # Where there is no such alias, the message is that of loading.
    prompt = load_registered(name, alias if version is None else str(version))
    return Source(prompt, name, version)


def require_source(bench: "Workbench", source: Source) -> None:
    """UserError unless the experiment's prompts can start from a source, and their scores on the test split hold then.

    A source that was trained on other data is the user's to judge: what it has seen is not known here.
    """
    prompt = source.prompt
    try:
        prompt.require(bench.backbone)
    except UserError as error:
        raise UserError(f"{_WHERE} {source.name} cannot be started from: {error}") from None
    if prompt.method != "prompt_tuning":
        raise UserError(f"{_WHERE} {source.name} is a prefix, and only a soft prompt can be started from; name another")
    own = prompt.provenance
    related = own.get("experiment") == bench.experiment.name or (
        own.get("dataset", {}).get("source") == bench.data.source
    )
    if related and may_have_seen_test(bench, prompt):
        raise UserError(
            f"{_WHERE} {source.name} may have been trained on rows of the test split, which was carved otherwise then; "
            "start from a prompt of the same seed and splits"
        )
