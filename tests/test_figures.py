"""A user's text is drawn as it is written."""

from io import BytesIO

from softprompt.evaluation import measure
from softprompt.figures import draw_systems


def test_a_dollar_is_no_formula():
    draw_systems({r"winner, text · text $\no formula$": measure([0, 1], [0, 1])}).savefig(BytesIO())
