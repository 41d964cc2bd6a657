"""How much is measured: a full pass in about half an hour on two CPU cores, a short one in under eight minutes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of every measurement."""

    matrix: int
    """Size of the square matrices whose product gives the machine's peak."""
    rounds: int
    """Turns of each side in training and in inference."""
    warm_up: int
    """Steps of a turn that are not counted; 1 or more."""
    steps: dict[int, int]
    """Steps of a turn that are counted, by prompt length (P)."""
    rows: int
    """Rows of a turn of inference."""
    warm_rows: int
    """Rows of a first call that is not counted."""

    score: float
    """Validation accuracy that both sides train to."""
    score_rows: int
    score_every: int
    """Steps between two validations."""

    trials: int
    """Trials of the sweep (N)."""
    rungs: tuple[int, int]
    """Steps before the first validation of a trial, and of a trial that is not pruned."""
    trial_rows: int
    """Validation rows that trials are scored on."""

    growth_steps: int
    lengths: tuple[int, ...]
    """P."""
    peer_lengths: tuple[int, ...]
    """P at which the peer is measured too."""
    batches: tuple[int, ...]
    """B."""
    sides: tuple[int, ...]
    """K."""
    inputs: tuple[int, ...]
    """T."""


FULL = Sizes(
    matrix=4096,
    rounds=3,
    warm_up=2,
    steps={20: 8, 100: 5},
    rows=200,
    warm_rows=40,
    score=0.82,
    score_rows=200,
    score_every=10,
    trials=16,
    rungs=(5, 20),
    trial_rows=100,
    growth_steps=4,
    lengths=(1, 5, 20, 50, 100),
    peer_lengths=(1, 20, 100),
    batches=(4, 8, 16, 32, 64),
    sides=(1, 2, 4, 8),
    inputs=(8, 16, 32, 64, 128),
)
QUICK = Sizes(
    matrix=4096,
    rounds=2,
    warm_up=1,
    steps={20: 3, 100: 2},
    rows=64,
    warm_rows=16,
    score=0.7,
    score_rows=64,
    score_every=5,
    trials=2,
    rungs=(3, 6),
    trial_rows=64,
    growth_steps=3,
    lengths=(1, 20, 100),
    peer_lengths=(1,),
    batches=(4, 16, 64),
    sides=(1, 4),
    inputs=(16, 64),
)
GPU = Sizes(
    matrix=8192,
    rounds=5,
    warm_up=20,
    steps={20: 100, 100: 100},
    rows=1200,
    warm_rows=400,
    score=0.85,
    score_rows=400,
    score_every=10,
    trials=32,
    rungs=(20, 160),
    trial_rows=400,
    growth_steps=50,
    lengths=(1, 5, 20, 50, 100),
    peer_lengths=(1, 20, 100),
    batches=(4, 16, 64, 256),
    sides=(1, 4, 16, 32),
    inputs=(16, 64, 256),
)
