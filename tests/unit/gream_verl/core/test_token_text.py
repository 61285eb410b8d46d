from __future__ import annotations

import pytest
from assets import make_index, make_tokenizer, reasoning_response
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from gream_verl.core.errors import InputError
from gream_verl.core.rsvr import score_response
from gream_verl.core.semantic_ids import find_tokens
from gream_verl.core.token_text import TokenText
from gream_verl.model.tiny_model import train_tokenizer

INDEX = make_index()
TOKENIZER = make_tokenizer(["likes Alien.", "<answer> </answer>"], INDEX)
TEXT = TokenText(TOKENIZER)
SPECIAL = train_tokenizer(["likes Alien.", "<answer> </answer>"], 512)
SPECIAL.add_tokens([AddedToken(token, normalized=False, special=False) for token in ("<think>", "</think>")])
SPECIAL.add_tokens([AddedToken(token, normalized=False, special=True) for token in INDEX.tokens])
SPECIAL_TEXT = TokenText(SPECIAL)
TRUTH = INDEX.sids["23"]
SID = INDEX.text("23")
PIECES = st.sampled_from([*TRUTH, "<think>", "</think>", "<answer>", "</answer>", "likes", " ", "\n", "<|im_end|>"])


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@settings(max_examples=25)
@given(st.lists(PIECES, max_size=12).map("".join))
def test_special_and_ordinary_sid_tokens_get_the_same_reward(text):
    # the two vocabularies have the same tokens in the same places
    ids = encode(TOKENIZER, text)
    assert ids == encode(SPECIAL, text)
    assert score_response(TEXT.read(ids), TRUTH) == score_response(SPECIAL_TEXT.read(ids), TRUTH)


def test_special_sid_tokens_would_vanish_from_the_text_of_a_decode_that_skips_them():
    ids = encode(SPECIAL, reasoning_response(SID))
    assert find_tokens(SPECIAL.decode(ids, skip_special_tokens=True)) == []
    assert score_response(SPECIAL_TEXT.read(ids), TRUTH).score == 1


@settings(max_examples=40)
@given(st.text(alphabet=st.characters(exclude_characters="|", max_codepoint=127)))
def test_plain_text_reads_as_it_is_decoded(text):
    ids = encode(TOKENIZER, text)
    assert TEXT.read(ids) == TOKENIZER.decode(ids)


def test_one_end_token_reads_as_nothing():
    end = TOKENIZER.eos_token_id
    ids = encode(TOKENIZER, SID)
    assert TEXT.read([*ids, end]) == TEXT.read(ids) == SID
    assert score_response(TEXT.read([*ids, end, end]), TRUTH, mode="direct").score == 0
    assert TEXT.read([]) == TEXT.read([end]) == ""


def test_ids_outside_the_vocabulary_are_unknown():
    size = len(TOKENIZER)
    assert TEXT.read([*encode(TOKENIZER, "likes"), size, size + 99]) == "likes\ufffd\ufffd"
    assert score_response(TEXT.read([*encode(TOKENIZER, SID), size]), TRUTH, mode="direct").score == 0


def test_a_sid_spelled_in_letters_is_no_sid():
    letters = [number for letter in SID for number in encode(TOKENIZER, letter)]
    assert TOKENIZER.decode(letters) == SID
    for format_ in ("strict", "reference"):
        assert score_response(TEXT.read(letters), TRUTH, mode="direct", format=format_).match == 0


def test_a_decoder_that_drops_leading_spaces_does_not_join_words():
    vocabulary = {"<unk>": 0, "\u2581likes": 1, "\u2581Alien": 2, "<0x0A>": 3, "</s>": 4}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.add_tokens(["<|a_1|>"])
    assert TokenText(tokenizer).read([1, 2, 3, 5, 4]) == " likes Alien\n<|a_1|>"


def test_what_no_response_can_hold_is_refused():
    TEXT.check(INDEX.tokens, "here")
    with pytest.raises(InputError, match=r"here: <\|z_1\|> is not one token of the tokenizer"):
        TEXT.check(["<|a_1|>", "<|z_1|>"], "here")


def test_a_tokenizer_that_is_not_fast_is_refused():
    class Slow:
        name_or_path = "slow"

    with pytest.raises(InputError, match="slow: not a fast tokenizer"):
        TokenText(Slow())
