"""Speed of RSVR from token ids, against decoding and one anchored regular expression, in one run.

The other side decodes a response, enforces the whole form by one pattern and looks the answer up. Both score the
same responses; the run fails when a reward differs. Our table of token texts is built once, outside the timing.

    python benchmarks/reward.py
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import timeit
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from gream_verl.core.rsvr import score_response
from gream_verl.core.semantic_ids import ItemIndex, SemanticId
from gream_verl.core.token_text import TokenText
from gream_verl.model.tiny_model import train_tokenizer
from gream_verl.model.vocabulary import add_sid_tokens

LEVELS, CODES, HISTORY = 4, 256, 20
WORDS = ("evidence", "preference", "intent", "drama", "comedy", "likes", "films", "of", "the", "old", "kind", "and")
STRICT = re.compile(
    r"<think>(?:(?!</?think>|</?answer>).)*</think>(?:(?!</?think>|</?answer>).)*"
    r"<answer>((?:<\|[a-z]_[1-9][0-9]*\|>)+)</answer>",
    re.DOTALL,
)
TOKEN = re.compile(r"<\|[a-z]_[1-9][0-9]*\|>")


def make_world(
    options: argparse.Namespace,
) -> tuple[ItemIndex, PreTrainedTokenizerFast, list[list[int]], list[SemanticId]]:
    """Return an index, a tokenizer, responses as token ids and the truth of each; a tenth of them is malformed."""
    draw = random.Random(options.seed)
    codes = draw.sample(range(CODES**LEVELS), options.items)
    index = ItemIndex.from_codes(
        [str(item) for item in range(options.items)],
        [[code // CODES**level % CODES for level in range(LEVELS)] for code in codes],
    )
    tokenizer = train_tokenizer([" ".join(WORDS), "<answer> </answer>"], 2048)
    add_sid_tokens(tokenizer, index)
    items, sids = list(index.sids), index.texts(list(index.sids))
    responses, truths = [], []
    for number in range(options.responses):
        end = f"</think>{''.join(draw.sample(sids, HISTORY))}<answer>{draw.choice(sids)}</answer>"
        closing = tokenizer.encode(end * (1 + (number % 10 == 0)), add_special_tokens=False)
        thought = "<think>" + " ".join(draw.choices(WORDS, k=options.tokens))
        opening = tokenizer.encode(thought, add_special_tokens=False)
        responses.append([*opening[: options.tokens - len(closing) - 1], *closing, tokenizer.eos_token_id])
        truths.append(index.sids[draw.choice(items)])
    return index, tokenizer, responses, truths


def with_regular_expression(text: str, truth: SemanticId, index: ItemIndex, end: str) -> tuple[float, float]:
    """Return reward and whether the answer is an item, by decoded text."""
    found = STRICT.fullmatch(text.removesuffix(end))
    if not found:
        return 0.0, 0.0
    answer = tuple(TOKEN.findall(found[1]))
    depth = next((level for level, pair in enumerate(zip(answer, truth, strict=False)) if pair[0] != pair[1]), LEVELS)
    return 1.0 if answer == truth else (depth / LEVELS) ** 0.5, float(answer in index.items)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both sides and print responses per second and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=500, help="tokens of each response")
    parser.add_argument("--items", type=int, default=12_101)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    index, tokenizer, responses, truths = make_world(options)
    reader = TokenText(tokenizer)
    end = tokenizer.eos_token

    def ours() -> list[tuple[float, float]]:
        scored = [
            score_response(reader.read(ids), truth, index=index) for ids, truth in zip(responses, truths, strict=True)
        ]
        return [(reward.score, reward.format and reward.valid_item) for reward in scored]

    def theirs() -> list[tuple[float, float]]:
        return [
            with_regular_expression(tokenizer.decode(ids, skip_special_tokens=False), truth, index, end)
            for ids, truth in zip(responses, truths, strict=True)
        ]

    if ours() != theirs():
        raise SystemExit("the rewards differ")
    fast, slow = (statistics.median(timeit.repeat(run, number=1, repeat=options.repeats)) for run in (ours, theirs))
    count = len(responses)
    print(
        f"{count} responses of {statistics.mean(map(len, responses)):.0f} tokens, one core, median of {options.repeats}"
    )
    print(f"token ids, look-up table        {count / fast:9,.0f} responses/s")
    print(f"decode and regular expression   {count / slow:9,.0f} responses/s")
    print(f"ratio {slow / fast:.1f}, rewards equal")


if __name__ == "__main__":
    main()
