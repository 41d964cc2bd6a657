"""What every part of an experiment is built from: a frozen model in which a misspelt key is an error."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PackagePin = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.+!-]+$")]
HubId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=96)]
"""A name of the hub, and never a folder or an address, which its libraries would take as well."""
Positive = Annotated[float, Field(gt=0)]


def _check_inner(path: str) -> str:
    for part in path.replace("!", "/").split("/"):
        if part in ("", ".", "..") or len(part.encode()) > 200 or not part.isprintable():
            raise ValueError(f"must be a plain path inside, without . or .., got {path[:60]!r}")
    return path


InnerPath = Annotated[str, AfterValidator(_check_inner)]
"""A path inside an archive or a repository, which is also part of a path on disk: it never leads out."""


class Spec(BaseModel):
    """Base of every part of an experiment."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
