"""The MLflow model as code, for labels: `mlflow models serve` runs it, and it loads the prompt that lies beside it.

The base model is not in the registry; it is had again by the reference in the prompt, and its hash is verified.
"""

from dataclasses import asdict

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from pydantic import BaseModel

from softprompt.prediction import Predictor
from softprompt.prompt import SoftPrompt


class Answer(BaseModel):
    """The answer for one row."""

    label: str
    """The best label."""
    probabilities: dict[str, float]
    """Probability of each label among the labels."""


class PromptModel(PythonModel):
    """Answers rows such as `{"text": "..."}` with a label and the probability of each."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the prompt that the registry keeps, and the base model that it names."""
        self._predictor = Predictor.open(SoftPrompt.load(context.artifacts["prompt"]))

    # MLflow takes the input's schema from this signature, and only without `context` and `params`.
    def predict(self, model_input: list[dict[str, str]]) -> list[Answer]:  # type: ignore[override]
        """Label N rows; a row holds the columns that the prompt's template names."""
        return [Answer(**asdict(prediction)) for prediction in self._predictor.predict(model_input)]


set_model(PromptModel())
