"""Labels of several tokens as a trie: what they share is read once, in scoring and in training.

Nothing here runs a model; it lays the labels out, and reads their log-probabilities from logits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from softprompt.batch import Tree

Labels = Sequence[tuple[int, ...]]
"""The token ids of each label, C of them, none a prefix of another."""


class Trie:
    """C labels that share what they begin with: a node for every beginning, an edge for every token after one.

    The empty beginning is the input itself; the S others are what the model has to read.
    """

    def __init__(self, labels: Labels, device: torch.device) -> None:
        begun = sorted({label[:n] for label in labels for n in range(1, len(label))}, key=lambda b: (len(b), b))
        edges = sorted({label[:n] for label in labels for n in range(1, len(label) + 1)})
        node = {(): 0} | {beginning: 1 + n for n, beginning in enumerate(begun)}
        self.size = len(begun)
        """S."""
        self.tree = Tree(
            torch.tensor([b[-1] for b in begun], dtype=torch.long, device=device),
            torch.tensor([len(b) - 1 for b in begun], dtype=torch.long, device=device),
            torch.tensor([[b[: len(a)] == a for a in begun] for b in begun], dtype=torch.bool, device=device),
        )
        self._nodes = torch.tensor([node[edge[:-1]] for edge in edges], device=device)
        self._tokens = torch.tensor([edge[-1] for edge in edges], device=device)
        self._paths = torch.tensor([[label[: len(e)] == e for label in labels] for e in edges], device=device).float()
        """`[E, C]` whether an edge is on the way to a label."""

    def score(self, logits: Tensor) -> Tensor:
        """`[N, C]` log-probability of each label's tokens, from logits `[N, 1 + S, V]` in float32."""
        return logits.log_softmax(2)[:, self._nodes, self._tokens] @ self._paths

    def spells(self, logits: Tensor) -> Tensor:
        """`[N, C]` whether each label's tokens are the first choice, from logits `[N, 1 + S, V]`."""
        chosen = logits.argmax(2)[:, self._nodes] == self._tokens
        return chosen.float() @ self._paths == self._paths.sum(0)
