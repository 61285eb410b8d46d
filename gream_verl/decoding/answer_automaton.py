"""The automaton of constrained answers: free text while a response thinks, then a real item, then the end.

It works on token ids and holds everything in flat arrays. Its first states watch free text for ``<answer>``, however
the text is cut into tokens. Every state after the tag has the tokens it allows, in compressed sparse rows: the prefix
tree of the items, the tokens of ``</answer>``, the end of the sequence. A step of many responses is a few gathers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.core.token_text import TokenText
from gream_verl.decoding.prefix_tree import PrefixTree, sid_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "<answer>", "</answer>"
FREE = 0  # state of free text; state n, up to 7, is free text that ends in the first n characters of the tag
ROOT = len(OPEN)  # state after the tag, and of an empty response in direct mode

Constraint = Literal["reasoning", "direct", "off"]


class ConstraintOptions(BaseModel):
    """Options of constrained answers, the same for rollouts and for training.

    ``reasoning`` allows after ``<answer>`` a real item, ``</answer>`` and the end, ``direct`` a real item and the end.
    With ``off`` only requests to vLLM that ask for it are constrained.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    index_file: str  # <D>.index.json, the items that may be answered
    mode: Constraint = "reasoning"


@dataclass(frozen=True)
class AnswerAutomaton:
    """The automaton of an item index and a tokenizer. The states before ``ROOT`` are free text.

    The ``tokens`` on the edges are allowed after the tag. In free text they are the few forbidden ones, which complete
    the tag and go on with other text.
    """

    watch: np.ndarray  # int64 [8, tokens + 1]; the state after a token of free text; last column: unknown tokens
    offsets: np.ndarray  # int64 [states + 1]; the edges of state s are offsets[s] up to offsets[s + 1]
    tokens: np.ndarray  # int64 [edges]
    targets: np.ndarray  # int64 [edges]; the state after an allowed token
    leaves: np.ndarray  # bool [states]; True where an item is complete
    end: int  # the state in which only the end-of-sequence token is allowed
    off: int  # the state of an unconstrained response; it has no edges and is never left

    @classmethod
    def build(cls, index: ItemIndex, tokenizer: PreTrainedTokenizerBase, model: str = "the model") -> AnswerAutomaton:
        """Build the automaton of the items that may be answered; ``model`` names the tokenizer in errors."""
        tree = PrefixTree.from_index(index, sid_ids(index, tokenizer, model))
        nodes, starts = len(tree.rows), tree.offsets.numpy()
        leaves = tree.rows.numpy() >= 0
        end = ROOT + nodes
        closing = tokenizer.encode(CLOSE, add_special_tokens=False)
        after_closing = [*range(end + 1, end + len(closing)), end]
        pieces = TokenText(tokenizer).pieces
        if "".join(pieces[token] for token in closing) != CLOSE:
            raise InputError(f"{model}: its tokenizer does not read {CLOSE} as it is written; take another tokenizer")
        watch, forbidden = _watch(pieces)

        # The states: 8 of free text, the nodes of the tree, the end, one for each further token of </answer>, `off`.
        # Edge e of the tree ends in node e + 1. A leaf has no edge in the tree and gets the first token of </answer>.
        leaf_edges = starts[:-1][leaves]
        sizes = [*map(len, forbidden), *np.where(leaves, 1, np.diff(starts)), *[1] * len(closing), 0]
        blocked = [token for tokens in forbidden for token in tokens]
        in_tree = np.insert(tree.tokens.numpy(), leaf_edges, closing[0])
        after_tree = np.insert(np.arange(ROOT + 1, end), leaf_edges, after_closing[0])
        flat = partial(np.concatenate, dtype=np.int64, casting="unsafe")  # an empty list is of floats
        tokens = flat([blocked, in_tree, [tokenizer.eos_token_id], closing[1:]])
        targets = flat([[-1] * len(blocked), after_tree, [end], after_closing[1:]])
        is_leaf = np.zeros(len(sizes), dtype=bool)
        is_leaf[ROOT:end] = leaves
        return cls(watch, np.append(0, np.cumsum(sizes)), tokens, targets, is_leaf, end, off=end + len(closing))

    def advance(self, states: np.ndarray, tokens: np.ndarray, direct: np.ndarray) -> np.ndarray:
        """Return the states after one more token; after ``<answer>`` a forbidden token leaves the state as it is.

        Args:
            states: int64 [n].
            tokens: int64 [n].
            direct: bool [n]; True for a response in direct mode, where the end follows the item.
        """
        after = states.copy()
        free = states < ROOT
        after[free] = self.watch[states[free], tokens[free].clip(max=self.watch.shape[1] - 1)]
        rows, edges = self._edges(np.where(free, self.end, states))
        taken = ~free[rows] & (self.tokens[edges] == tokens[rows])
        after[rows[taken]] = self.targets[edges[taken]]
        return np.where(direct & self.leaves[after], self.end, after)

    def states_before(self, tokens: np.ndarray, mode: Constraint) -> np.ndarray:
        """Return the state in which each token of a response is drawn, int64 [responses, length].

        Args:
            tokens: int64 [responses, length], padded on the left with -1, which changes no state.
            mode: The mode of all responses.
        """
        start = {"reasoning": FREE, "direct": ROOT, "off": self.off}[mode]
        states, direct = np.full(tokens.shape, start), np.full(len(tokens), mode == "direct")
        opens = self.watch[FREE, tokens.clip(max=self.watch.shape[1] - 1)].any(axis=0)  # bool [length]
        for column in range(tokens.shape[1] - 1):
            if opens[column] or states[:, column].any():  # else free text stays free text, as in most columns
                states[:, column + 1] = self.advance(states[:, column], tokens[:, column], direct)
        return states

    def constrain(self, logits: Tensor, states: np.ndarray) -> Tensor:
        """Set the logits [n, vocabulary] of forbidden tokens to minus infinity, in place; ``states`` is int64 [n]."""

        def on_device(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(logits.device)

        rows, edges = self._edges(states)
        free = states[rows] < ROOT
        if free.any():
            logits[on_device(rows[free]), on_device(self.tokens[edges[free]])] = -torch.inf
        if not free.all():
            places = on_device(rows[~free]), on_device(self.tokens[edges[~free]])
            kept = logits[places]
            logits[on_device(np.unique(rows[~free]))] = -torch.inf
            logits[places] = kept
        return logits

    def _edges(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the edges of many states, packed: the position in ``states`` and the edge, both int64 [edges]."""
        starts = self.offsets[states]
        counts = self.offsets[states + 1] - starts
        places = np.repeat(np.arange(len(states)), counts)
        return places, np.arange(len(places)) + np.repeat(starts - (counts.cumsum() - counts), counts)


def _watch(pieces: Sequence[str]) -> tuple[np.ndarray, list[list[int]]]:
    """Return the transitions of free text, and per state the tokens that complete the tag and go on with other text."""
    watch = np.zeros((ROOT, len(pieces)), dtype=np.int64)
    forbidden: list[list[int]] = [[] for _ in range(ROOT)]
    for token, piece in enumerate(pieces):
        if not piece:
            watch[:, token] = np.arange(ROOT)
            continue
        for state in range(ROOT):
            if "<" not in piece and (state == 0 or not piece.startswith(OPEN[state])):
                continue  # the tag has one "<", so no other piece begins or continues it
            text = OPEN[:state] + piece
            opened = text.find(OPEN)
            if opened >= 0 and opened + len(OPEN) < len(text):
                forbidden[state].append(token)
            watch[state, token] = next(n for n in range(ROOT, -1, -1) if text.endswith(OPEN[:n]))
    return watch, forbidden
