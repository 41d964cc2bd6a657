"""The environment of every test: no network, no telemetry, and no trace outside a folder of this session.

Prefect, MLflow and transformers read the environment when they are imported, so it is set here, before any of
them. What the user has configured is dropped: a test never reaches somebody's server, results or caches.
"""

import atexit
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from softprompt.backbone import Backbone
    from tests.cable import Cable
    from tests.mlflow_server import MlflowServer

_SESSION = Path(tempfile.mkdtemp(prefix="softprompt-tests-"))
atexit.register(shutil.rmtree, _SESSION, ignore_errors=True)

for _name in list(os.environ):
    if _name.startswith(("PREFECT_", "MLFLOW_", "SOFTPROMPT_")):
        del os.environ[_name]

os.environ.update(
    DO_NOT_TRACK="true",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    MLFLOW_DISABLE_TELEMETRY="true",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    HF_HOME=str(_SESSION / "huggingface"),
    PREFECT_HOME=str(_SESSION / "prefect"),  # cached results live here, and would outlive the test database
    OMP_NUM_THREADS="1",  # tiny models only lose by a second thread
    SOFTPROMPT_HOME=str(_SESSION / "state"),
    SOFTPROMPT_CACHE=str(_SESSION / "cache"),
)


_LONG = ("deployments", "cli", "delivery", "secrets", "lanes", "retune", "flows")
"""Files whose tests wait for servers and clocks: begun first, so that none of them is the last to end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first; everything else stays in its order."""
    places = {f"test_{name}": place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture
def free_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def frozen() -> Iterator[Callable[..., "Backbone"]]:
    """Makes tiny backbones as `tiny_backbone` does, and looks after the test whether they are what they were."""
    from tests.tiny import tiny_backbone

    made: list[Backbone] = []

    def make(*args: Any, **overrides: Any) -> "Backbone":
        made.append(tiny_backbone(*args, **overrides))
        return made[-1]

    yield make
    for backbone in made:
        assert backbone.weights_in_memory_sha256() == backbone.weights_sha256
        assert all(weight.grad is None for weight in backbone.model.parameters())
        assert not any(module.training for module in backbone.model.modules())


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """One temporary Prefect server for all tests that run whole flows; it takes some ten seconds to start."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package index, by pip's own configuration."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[MlflowServer]":
    """One real MLflow server for all tests that need one; a test that stops it starts it again."""
    from tests.mlflow_server import MlflowServer

    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def cable(mlflow_server: "MlflowServer", monkeypatch: pytest.MonkeyPatch) -> "Iterator[Cable]":
    """A cable to the server, which is tracked to in this test."""
    from tests.cable import Cable

    laid = Cable(mlflow_server.port)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", laid.uri)
    yield laid
    laid.close()
