"""Whether a prompt may have been trained or chosen on rows that it is now to be measured on.

What is passed on with the vectors passes on what they have seen: a prompt that starts from another one has seen the
rows of both.
"""

from typing import TYPE_CHECKING

from softprompt.prompt import SoftPrompt
from softprompt.template import columns_of

if TYPE_CHECKING:
    from softprompt.workbench import Workbench

OTHER_SPLITS = "other splits: may have seen test rows"
"""Said of a prompt whose score on the test split cannot be trusted."""


def may_have_seen_test(bench: "Workbench", prompt: SoftPrompt) -> bool:
    """Whether rows of the test split may be among those that a prompt was trained or chosen on.

    A test split that the data names is the user's to keep apart. A carved one is safe where the prompt's own was carved
    from the same order, by seed and columns, and reached at least as far: all that it was trained on comes later.
    """
    bound, own = bench.data.test_bound, prompt.provenance
    if bound is None:
        return False
    same_order = (own.get("seed"), columns_of(prompt.template)) == (bench.experiment.seed, bench.experiment.fields)
    return not same_order or bound > (own.get("dataset", {}).get("test_bound") or "")
