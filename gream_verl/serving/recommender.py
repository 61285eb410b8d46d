"""Recommendations for histories that come one by one: both modes of ``gream evaluate``, kept ready."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from gream_verl.core.files import fingerprint
from gream_verl.core.origin import check_model, mark
from gream_verl.core.prompts import messages
from gream_verl.core.rsvr import Mode
from gream_verl.core.run_folder import RunFolder
from gream_verl.decoding.beam_ranker import BeamRanker, shared_prefix
from gream_verl.decoding.chains import ANSWER, THOUGHT_END, merge_rankings, up_to_answer
from gream_verl.model.answer_judge import ending_log_probs
from gream_verl.model.loading import load_decoding_config, load_model, load_tokenizer, resolve_model
from gream_verl.serving.catalogue import Catalogue

HISTORY, BEAMS = 20, (30, 50, 100)
"""Latest items of a history that a prompt shows, and beams: those of ``gream evaluate``, or more for a longer list."""
THOUGHT = 256
"""Most tokens of a chain of thought."""
TREES = 32
"""Trees of allowed items that are kept."""
NO_HISTORY = "no item of the history is known: these are the most popular ones"
_Key = tuple[frozenset[str] | None, int, Mode]


@dataclass(frozen=True)
class Ask:
    """A question for items.

    Attributes:
        history: Item ids, oldest first. Ids that the index does not hold are passed over.
        k: Number of items wanted.
        exclude: Items that must not be recommended, besides those of the history.
        allow: Items that may be; None for all.
        chains: Chains of thought for this history, as the model wrote them; none for direct mode.
    """

    history: tuple[str, ...]
    k: int = 10
    exclude: frozenset[str] = frozenset()
    allow: frozenset[str] | None = None
    chains: tuple[str, ...] = ()

    @property
    def mode(self) -> Mode:
        """Mode of the answer."""
        return "reasoning" if self.chains else "direct"


@dataclass(frozen=True)
class Answer:
    """The answer to an :class:`Ask`.

    Attributes:
        scores: The items and the log-probability of each, in nats, best first; of a fallback their counts.
        unknown: Ids of the history that the index does not hold.
        fallback: Why the answer is not the model's, "" where it is.
        shortage: Why there are fewer than ``k``, "" where there are enough.
    """

    scores: dict[str, float]
    unknown: tuple[str, ...] = ()
    fallback: str = ""
    shortage: str = ""


class Recommender:
    """A model and its catalogue, ready to answer.

    Args:
        run: A run with a prepared data set and an index.
        checkpoint: A Hugging Face folder or verl's folder of checkpoints; None takes ``RUN/srpo``, else ``RUN/sft``.
        batch_size: Most sequences computed at once.

    Attributes:
        trees: Number of batches whose tree was kept, and of those for which it was built.
    """

    def __init__(self, run: RunFolder, checkpoint: Path | None = None, batch_size: int = 32) -> None:
        checkpoint = checkpoint or run.trained
        self.folder, self.batch_size = resolve_model(checkpoint), batch_size
        check_model(self.folder, run.data.index)
        self.catalogue = Catalogue(run.data)
        self.index = index = self.catalogue.index
        self.tokenizer = load_tokenizer(self.folder)
        positions = load_decoding_config(self.folder, self.tokenizer).max_position_embeddings
        direct = positions - max(map(len, index.sids.values()))
        tags = len(self._encode(THOUGHT_END + ANSWER))
        self._most_tokens: dict[Mode, int] = {"direct": direct, "reasoning": direct - tags - THOUGHT}
        self.model = load_model(self.folder, inference=True)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.clone()  # else it lies in the file, which somebody may overwrite
        weights = [fingerprint(file)[:12] for file in sorted(self.folder.glob("*.safetensors"))]
        self.version = {"model": f"{checkpoint.name}:{'-'.join(weights)}", "index": mark(run.data.index)}
        # All prompts of a mode begin alike up to where the smallest and the largest semantic ID differ.
        ends = [extreme(index.sids, key=index.sids.__getitem__) for extreme in (min, max)]
        modes: tuple[Mode, ...] = ("direct", "reasoning")
        self._prefixes = {mode: shared_prefix([self.prompt([item], mode) for item in ends]) for mode in modes}
        self._lock = threading.Lock()  # one computation at a time
        self._rankers: OrderedDict[_Key, BeamRanker] = OrderedDict()
        self.trees = {"kept": 0, "made": 0}

    def recommend(self, asks: Sequence[Ask]) -> list[Answer]:
        """Answer several questions; those with the same mode and allowed items are computed together."""
        answers: dict[int, Answer] = {}
        together: defaultdict[_Key, list[int]] = defaultdict(list)
        histories = [self.known(ask.history) for ask in asks]
        for number, (ask, (known, unknown)) in enumerate(zip(asks, histories, strict=True)):
            if known and self._left(ask):
                together[ask.allow, next(beams for beams in BEAMS if ask.k <= beams), ask.mode].append(number)
            else:
                answers[number] = self._popular(ask, unknown)
        for key, numbers in together.items():
            sequences = [self._sequences(asks[number], histories[number][0]) for number in numbers]
            flat = [(ids, self._gone(asks[row])) for row, some in zip(numbers, sequences, strict=True) for ids in some]
            with self._lock:
                ranked = iter(self._ranker(*key).rank(flat))
            for number, some in zip(numbers, sequences, strict=True):
                scores = merge_rankings(list(islice(ranked, len(some))), asks[number].k)
                shortage = self._shortage(asks[number], len(scores))
                answers[number] = Answer(scores, histories[number][1], shortage=shortage)
        return [answers[number] for number in range(len(asks))]

    def check(self) -> None:
        """Answer a question, past any queue; raise InputError for a model that computes no numbers."""
        self.recommend([Ask((next(iter(self.index.sids)),))])

    def score(self, asks: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[dict[str, float]]:
        """Return the log-probabilities, in nats, of items of the index after known items, the most probable first."""
        pairs = [(number, item) for number, (_, items) in enumerate(asks) for item in items]
        prompts, ids = [self.prompt(known, "direct") for known, _ in asks], self.tokenizer.convert_tokens_to_ids
        found: list[dict[str, float]] = [{} for _ in asks]
        for start in range(0, len(pairs), self.batch_size):
            part = pairs[start : start + self.batch_size]
            endings = [ids(list(self.index.sids[item])) for _, item in part]
            whole = [[*prompts[number], *ending] for (number, _), ending in zip(part, endings, strict=True)]
            with self._lock:
                log_probs = ending_log_probs(self.model, whole, list(map(len, endings)))
            for (number, item), row in zip(part, log_probs, strict=True):
                found[number][item] = float(row.sum())
        return [dict(sorted(scores.items(), key=lambda pair: -pair[1])) for scores in found]

    def known(self, history: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
        """Return the ids of a history that the index holds, and the others."""
        known = [item for item in history if item in self.index.sids]
        return known, tuple(item for item in history if item not in self.index.sids)

    def prompt(self, history: Sequence[str], mode: Mode) -> list[int]:
        """Return the token ids of the question for known items; it loses its oldest items where it is too long."""
        shown = history[-HISTORY:]
        while True:
            turns = messages("".join(self.index.texts(shown)), mode)
            ids = self._encode(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
            if len(ids) <= self._most_tokens[mode] or len(shown) == 1:
                return ids
            shown = shown[1:]

    def _sequences(self, ask: Ask, known: Sequence[str]) -> list[list[int]]:
        """Return what the answer follows: the prompt, or the prompt with each chain."""
        prompt = self.prompt(known, ask.mode)
        return [[*prompt, *self._encode(up_to_answer(chain)[0])] for chain in ask.chains] or [prompt]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _gone(self, ask: Ask) -> set[str]:
        return {*ask.history, *ask.exclude}

    def _left(self, ask: Ask) -> int:
        """Return the number of items that may be recommended."""
        gone = {item for item in self._gone(ask) if item in self.index.sids}
        if ask.allow is None:
            return len(self.index) - len(gone)
        return sum(item in self.index.sids and item not in gone for item in ask.allow)

    def _shortage(self, ask: Ask, found: int) -> str:
        if found >= ask.k:
            return ""
        return f"{self._left(ask)} items are left without the history, the excluded and those that are not allowed"

    def _popular(self, ask: Ask, unknown: tuple[str, ...]) -> Answer:
        gone, popularity = self._gone(ask), self.catalogue.popularity
        left = (item for item in popularity if item not in gone and (ask.allow is None or item in ask.allow))
        scores = {item: float(popularity[item]) for item in islice(left, ask.k)}
        return Answer(scores, unknown, NO_HISTORY if scores else "", self._shortage(ask, len(scores)))

    def _ranker(self, allow: frozenset[str] | None, beams: int, mode: Mode) -> BeamRanker:
        """Return the ranker of a set of items, made when it is asked for first."""
        key = allow, beams, mode
        self.trees["kept" if key in self._rankers else "made"] += 1
        if key not in self._rankers:
            index = self.index
            if allow is not None:
                index = replace(index, sids={item: sid for item, sid in index.sids.items() if item in allow})
            self._rankers[key] = BeamRanker(
                self.model, self.tokenizer, index, self._prefixes[mode], beams=beams, batch_size=self.batch_size
            )
            if len(self._rankers) > TREES:
                del self._rankers[next(key for key in self._rankers if key[0] is not None)]
        self._rankers.move_to_end(key)
        return self._rankers[key]
