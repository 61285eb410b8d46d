"""The text of token ids as the reward reads it, independent of which tokens a tokenizer or an engine calls special."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import SemanticId, find_tokens, parse_sid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANCHOR = "x"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
MASKED_BAR = "\N{BROKEN BAR}"


class TokenText:
    """A table with the text of every token id of a fast tokenizer: reading a response is one look-up per token.

    The bars of every token that is no SID token are masked, so that a response that spells a SID letter by letter
    contains none. Ids without a token (rows of a padded vocabulary) read as U+FFFD.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.pieces = _pieces(tokenizer)
        self._tokenizer = tokenizer
        self._eos = tokenizer.eos_token_id
        self._checked: set[str] = set()

    def read(self, ids: Sequence[int]) -> str:
        """Return the text of a response, without one end-of-sequence token at its end."""
        if ids and ids[-1] == self._eos:
            ids = ids[:-1]
        try:
            return "".join(map(self.pieces.__getitem__, ids))
        except IndexError:
            last = len(self.pieces) - 1  # the entry of unknown ids
            return "".join(self.pieces[min(number, last)] for number in ids)

    def ground_truth(self, reward_model: Mapping[str, Any] | None, row_label: str) -> SemanticId:
        """Return the SID of the target in a row's column ``reward_model``; ``row_label`` begins an error."""
        text = (reward_model or {}).get("ground_truth")
        truth = parse_sid(text) if isinstance(text, str) else None
        if truth is None:
            raise InputError(
                f"{row_label}: reward_model.ground_truth is {text!r}, no SID; make the file with `gream data rl`"
            )
        self.check(truth, row_label)
        return truth

    def check(self, sid_tokens: Iterable[str], label: str) -> None:
        """Refuse what is not one token of the tokenizer; ``label`` begins the error."""
        for token in sid_tokens:
            if token in self._checked:
                continue
            ids = self._tokenizer.encode(token, add_special_tokens=False)
            if len(ids) != 1 or self.read(ids) != token:
                raise InputError(f"{label}: {token} is not one token of the tokenizer; run `gream model extend`")
            self._checked.add(token)


def _pieces(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of every id, and U+FFFD as a last entry for unknown ids."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        raise InputError(f"{tokenizer.name_or_path}: not a fast tokenizer; use one with a tokenizer.json")
    tokens = tokenizer.get_vocab()
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    # After an anchor, because some decoders drop the space at the beginning of a text.
    start = len(decoder.decode([ANCHOR]))
    pieces = [UNKNOWN] * (max(tokens.values()) + 2)
    for token, number in tokens.items():
        text = token if token in added else decoder.decode([ANCHOR, token])[start:]
        pieces[number] = text if find_tokens(text) == [text] else text.replace("|", MASKED_BAR)
    return pieces
