"""Where the rows come from, and how a row becomes an example.

What would give two labels the same words, or one label two, is refused here, before any row is read.
"""

from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from softprompt.objective import ACCURACY, TOKEN_LOSS, Objective
from softprompt.spec.base import HubId, InnerPath, PackagePin, Sha256, Spec


class PackageData(Spec):
    """Rows carried by a source distribution or wheel on the package index."""

    kind: Literal["package"] = "package"
    package: PackagePin
    """Name and exact version, as in `vaderSentiment==3.3.2`."""
    sha256: Sha256
    """SHA-256 of the package file; checked at every use."""
    file: InnerPath
    """Path inside the package; `outer.tar.gz!inner.txt` reaches into an archive within it."""
    format: Literal["csv", "tsv", "jsonl", "parquet"]
    """How the file is written."""
    columns: tuple[str, ...] | None = None
    """Column names, for a CSV or TSV file without a header row."""


class FileData(Spec):
    """Rows in CSV, TSV, JSONL or Parquet files of your own."""

    kind: Literal["file"] = "file"
    path: str | None = None
    """One file, from which the splits are carved."""
    train: str | None = None
    """A file of training rows, when the splits are files of their own."""
    validation: str | None = None
    """A file of validation rows; carved from the training rows when absent."""
    test: str | None = None
    """A file of test rows; carved from the training rows when absent."""
    format: Literal["csv", "tsv", "jsonl", "parquet"] | None = None
    """How the files are written; by default their suffix tells."""
    columns: tuple[str, ...] | None = None
    """Column names, for CSV or TSV files without a header row."""

    @model_validator(mode="after")
    def _one_file_or_a_train_file(self) -> Self:
        if (self.path is None) == (self.train is None):
            raise ValueError("give either path (one file to carve) or train (and validation, test)")
        if self.path is not None and (self.validation or self.test):
            raise ValueError("path is carved into splits; name the training file train to give other splits")
        return self


class HubData(Spec):
    """A dataset of the Hugging Face hub."""

    kind: Literal["hub"] = "hub"
    id: HubId
    """Dataset id, as in `stanfordnlp/sst2`."""
    config: InnerPath | None = None
    """Configuration of the dataset, where it has several."""
    revision: InnerPath
    """Commit hash or tag."""
    train: str = "train"
    """The hub's name of the training split."""
    validation: str | None = None
    """The hub's name of the validation split; carved from the training rows when absent."""
    test: str | None = None
    """The hub's name of the test split; carved from the training rows when absent."""


DataSpec = Annotated[PackageData | FileData | HubData, Field(discriminator="kind")]


class ColumnLabels(Spec):
    """The label stands in a column."""

    objective: ClassVar[Objective] = ACCURACY

    kind: Literal["column"] = "column"
    field: str
    """Column that holds the label."""
    words: dict[str, str] = Field(min_length=2)
    """For each label value, the text the model is to continue with; a leading space matters."""

    @model_validator(mode="after")
    def _words_differ(self) -> Self:
        return _check_words(self, list(self.words.values()))


class RatingBin(Spec):
    """One label of a numeric rating: the rows with `min <= rating <= max`."""

    label: str
    """Name of the label."""
    word: str
    """The text the model is to continue with; a leading space matters."""
    min: float | None = None
    """Least rating, included."""
    max: float | None = None
    """Greatest rating, included."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min <= max must hold, got min={self.min:g}, max={self.max:g}")
        return self

    def holds(self, rating: float) -> bool:
        """Whether a rating falls into the bin."""
        return (self.min is None or rating >= self.min) and (self.max is None or rating <= self.max)


class RatingLabels(Spec):
    """The label is read off a numeric column; rows in no bin are left out and counted."""

    objective: ClassVar[Objective] = ACCURACY

    kind: Literal["rating"] = "rating"
    field: str
    """Column that holds the number."""
    bins: tuple[RatingBin, ...] = Field(min_length=2)
    """The labels; the first bin that holds a rating wins."""

    @model_validator(mode="after")
    def _labels_and_words_differ(self) -> Self:
        labels = [b.label for b in self.bins]
        if len(set(labels)) != len(labels):
            raise ValueError(f"every label has one bin, got {labels}; give each bin a label of its own")
        return _check_words(self, [b.word for b in self.bins])

    @property
    def words(self) -> dict[str, str]:
        """For each label, the text the model is to continue with."""
        return {b.label: b.word for b in self.bins}


class FreeText(Spec):
    """The target is a text of its own for every row, and the model is to generate it."""

    objective: ClassVar[Objective] = TOKEN_LOSS

    kind: Literal["text"] = "text"
    field: str
    """Column that holds the text."""
    before: str = " "
    """What stands between the input and the text; most tokenizers join a space to the word after it."""
    max_new_tokens: int = Field(ge=1, le=32_768)
    """Most tokens of a text, its end included; longer ones are cut, and counted. Generation stops there, too."""

    @property
    def words(self) -> dict[str, str]:
        """None: no label stands for a text."""
        return {}


S = TypeVar("S", bound=Spec)


def _check_words(spec: S, words: list[str]) -> S:
    if len(set(words)) != len(words) or not all(w.strip() for w in words):
        raise ValueError(f"every label needs a word of its own that is not blank, got {words}")
    return spec


LabelSpec = Annotated[ColumnLabels | RatingLabels | FreeText, Field(discriminator="kind")]

SplitSize = Annotated[int, Field(ge=1)]


class SplitSpec(Spec):
    """Rows to carve for splits that the data does not name. Carving is seeded by the experiment."""

    validation: SplitSize
    """Validation rows; the search scores trials on them."""
    test: SplitSize
    """Test rows; no search ever sees them."""
    train: SplitSize | None = None
    """At most this many training rows; all that are left by default."""
