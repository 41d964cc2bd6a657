"""A user's text is drawn as it is written."""

from io import BytesIO

import numpy as np

from softprompt.evaluation import measure, measure_targets
from softprompt.figures import draw_systems


def test_a_dollar_is_no_formula():
    draw_systems({r"winner, text · text $\no formula$": measure([0, 1], [0, 1])}).savefig(BytesIO())


def test_the_axis_says_what_is_drawn_and_holds_every_bar():
    (accuracy,) = draw_systems({"winner": measure([0, 1], [0, 1])}).axes
    assert (accuracy.get_xlabel(), accuracy.get_xlim()) == (
        "accuracy on 2 test rows, % (bars: 95 % interval)",
        (0, 100),
    )
    texts = measure_targets(np.array([-6.0, -1.0]), [2, 2], np.array([False, True]))
    (loss,) = draw_systems({"winner": texts}).axes
    assert loss.get_xlabel() == "loss on 2 test rows, nats per token (bars: 95 % interval)"
    assert loss.get_xlim()[1] > texts.high
