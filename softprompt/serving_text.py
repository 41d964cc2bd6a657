"""The MLflow model as code for a prompt that answers with a free text; `serving` is that for labels.

A file of its own, because MLflow takes the answer's schema from the code, and an answer has either shape.
"""

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from pydantic import BaseModel

from softprompt.prediction import Writer
from softprompt.prompt import SoftPrompt


class Answer(BaseModel):
    """The answer for one row."""

    answer: str
    """The generated text."""


class PromptModel(PythonModel):
    """Answers rows such as `{"text": "..."}` with a text."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the prompt that the registry keeps, and the base model that it names."""
        self._writer = Writer.open(SoftPrompt.load(context.artifacts["prompt"]))

    # MLflow takes the input's schema from this signature, and only without `context` and `params`.
    def predict(self, model_input: list[dict[str, str]]) -> list[Answer]:  # type: ignore[override]
        """Generate a text for N rows; a row holds the columns that the prompt's template names."""
        return [Answer(answer=text) for text in self._writer.write(model_input)]


set_model(PromptModel())
