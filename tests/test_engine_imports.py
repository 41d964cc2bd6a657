"""The engine runs on a bare GPU image: importing it, package `__init__` included, loads nothing of the layers above."""

import json
import subprocess
import sys

ENGINE = ["backbone", "batch", "checkpointing", "composition", "decoder", "dropout", "encoder_decoder", "errors"]
ENGINE += ["generation", "inference", "initialization", "likelihood", "loss", "operations", "packages"]
ENGINE += ["parameterization", "passes", "prefix", "probe", "prompt", "quantization", "template", "training", "trie"]
ABOVE = {
    "optuna",
    "mlflow",
    "prefect",
    "datasets",
    "pydantic",
    "sklearn",
    "matplotlib",
    "softprompt.spec",
    "softprompt.data",
}


def test_the_engine_loads_nothing_of_the_layers_above():
    script = "import importlib, json, sys\n"
    script += f"for name in {ENGINE}: importlib.import_module('softprompt.' + name)\n"
    script += "print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ABOVE.isdisjoint(json.loads(result.stdout))
