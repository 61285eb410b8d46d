from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from assets import make_index, make_tokenizer, reasoning_response

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from gream_verl.core.errors import InputError
from gream_verl.decoding.answer_automaton import FREE, ROOT, AnswerAutomaton
from gream_verl.decoding.truth_scoring import decompress
from gream_verl.decoding.vllm_processor import ConstrainedAnswer, Slots, TruthScorer

INDEX = make_index()
TOKENIZER = make_tokenizer(["likes Alien.", "<answer> </answer>"], INDEX)
AUTOMATON = AnswerAutomaton.build(INDEX, TOKENIZER)
SLOTS = 6
SCRIPTS = {
    "reasoning": [TOKENIZER.encode(reasoning_response(INDEX.text(item)), add_special_tokens=False) for item in "357"],
    "direct": [TOKENIZER.encode(INDEX.text(item), add_special_tokens=False) for item in ("3", "22", "23")],
    "off": [[5, 6, 7, 8]],
}


def processor(mode: str = "reasoning") -> ConstrainedAnswer:
    made = ConstrainedAnswer.__new__(ConstrainedAnswer)  # without an engine
    made.mode, made.automaton, made.slots = mode, AUTOMATON, Slots(AUTOMATON, SLOTS)
    return made


def parameters(mode: str | None = None) -> SamplingParams:
    return SamplingParams(extra_args={"gream": mode} if mode else None)


def expected_state(request: tuple[str, list[int]] | None) -> int:
    if request is None or request[0] == "off":
        return AUTOMATON.off
    mode, output = request
    state, direct = np.array([ROOT if mode == "direct" else FREE]), np.array([mode == "direct"])
    for token in output:
        state = AUTOMATON.advance(state, np.array([token]), direct)
    return int(state[0])


@pytest.mark.parametrize("seed", range(3))
def test_states_follow_requests_that_come_go_and_move(seed):
    draw, made = random.Random(seed), processor()
    batch: dict[int, tuple[str, list[int]]] = {}  # slot -> mode and what was sampled so far
    scripts: dict[int, list[int]] = {}  # id of the output list -> what is sampled next
    moves = 0
    for _ in range(120):
        removed = [slot for slot in list(batch) if draw.random() < 0.1]
        for slot in removed:
            del batch[slot]
        added = []
        for slot in range(SLOTS):
            if slot not in batch and draw.random() < 0.4:
                mode = draw.choice(["reasoning", "direct", "off"])
                script = list(draw.choice(SCRIPTS[mode]))
                known = draw.choice([0, 0, 3])  # taken up again after a preemption
                output = script[:known]
                batch[slot], scripts[id(output)] = (mode, output), script[known:]
                added.append((slot, parameters(None if mode == "reasoning" else mode), None, output))
        moved = []
        for _ in range(draw.choice([0, 0, 1, 2])):
            source, target = draw.sample(range(SLOTS), 2)
            swap = draw.random() < 0.5
            if source not in batch or (swap and target not in batch) or (not swap and target in batch):
                continue
            moved.append((source, target, MoveDirectionality.SWAP if swap else MoveDirectionality.UNIDIRECTIONAL))
            one, other = batch.pop(source), batch.pop(target, None)
            batch[target] = one
            if other is not None:
                batch[source] = other
            moves += 1
        made.update_state(BatchUpdate(SLOTS, removed, added, moved) if removed or added or moved else None)
        pending = []
        for _, output in batch.values():  # sampled while the batch was changed; some not known yet
            script = scripts[id(output)]
            if script and draw.random() < 0.3:
                output.append(-1)
                pending.append(output)
        made.slots.read()
        for output in pending:
            output[-1] = scripts[id(output)].pop(0)
        made.apply(torch.zeros(SLOTS, len(TOKENIZER)))
        assert made.slots.states.tolist() == [expected_state(batch.get(slot)) for slot in range(SLOTS)]
        for _, output in batch.values():
            script = scripts[id(output)]
            if script:
                output.append(script.pop(0))
    assert moves > 10


def test_a_request_that_switched_it_off_is_left_alone_whatever_its_neighbours_do():
    made = processor()
    made.update_state(BatchUpdate(2, [], [(0, parameters("off"), None, [1]), (1, parameters("direct"), None, [])], []))
    logits = torch.randn(2, len(TOKENIZER))
    before = logits.clone()
    made.apply(logits)
    assert torch.equal(logits[0], before[0])
    assert logits[1].isfinite().sum() == len({sid[0] for sid in INDEX.sids.values()})


def test_without_a_constrained_request_nothing_is_touched():
    made = processor("off")
    made.update_state(BatchUpdate(1, [], [(0, parameters(), None, [])], []))
    logits = torch.randn(1, len(TOKENIZER))
    assert made.apply(logits) is logits
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"additional_config\.gream\.index_file: Field required"),
        ({"gream": {"index_file": "x", "mode": "loose"}}, r"additional_config\.gream\.mode"),
        ({"gream": {"index_file": "x", "modes": "direct"}}, r"additional_config\.gream\.modes"),
    ],
)
def test_wrong_options_are_named(given, message):
    class Config:
        additional_config = given

    with pytest.raises(InputError, match=message):
        ConstrainedAnswer(Config(), torch.device("cpu"), False)


class SecondRunner:
    """vLLM's second runner as its processors see it: a table of requests in slots, and the slots of each step.

    ``requests`` holds the mode or the given tokens of the request in each slot.
    """

    def __init__(self, processor, seed: int) -> None:
        self.processor, self.draw, self.requests = processor, random.Random(seed), {}
        self.outputs: dict[int, list[int]] = {}
        self.all_token_ids = SimpleNamespace(gpu=torch.zeros(SLOTS, 64, dtype=torch.int32))
        self.prompt_len = SimpleNamespace(np=np.zeros(SLOTS, dtype=np.int32))
        processor.requests = self

    def begin(self, slot: int, request, parameters: SamplingParams, output: list[int]) -> None:
        """Put a request into a slot; one that was interrupted has output already."""
        self.prompt_len.np[slot] = prompt = self.draw.randrange(1, 9)
        self.requests[slot], self.outputs[slot] = request, output
        self.all_token_ids.gpu[slot] = 1
        self.all_token_ids.gpu[slot, prompt : prompt + len(output)] = torch.tensor(output, dtype=torch.int32)
        self.processor.add_request(slot, parameters)

    def step(self, logits: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """Compute some of the requests; returns their slots and logits."""
        slots = [slot for slot in self.draw.sample(list(self.requests), len(self.requests)) if self.draw.random() < 0.8]
        ends = [int(self.prompt_len.np[slot]) + len(self.outputs[slot]) - 1 for slot in slots]
        tokens = [self.outputs[slot][-1] if self.outputs[slot] else 1 for slot in slots]
        ctx = SimpleNamespace(
            idx_mapping_np=np.array(slots, int), pos=torch.tensor(ends), input_ids=torch.tensor(tokens)
        )
        return slots, self.processor.apply(logits[: len(slots)].clone(), ctx)

    def sampled(self, slot: int, token: int) -> None:
        self.all_token_ids.gpu[slot, int(self.prompt_len.np[slot]) + len(self.outputs[slot])] = token
        self.outputs[slot].append(token)


@pytest.mark.parametrize("seed", range(3))
def test_states_follow_the_requests_of_the_second_runner(seed):
    made = processor()
    runner, draw, scripts = SecondRunner(made, seed), random.Random(seed), {}
    interrupted = 0
    for _ in range(120):
        for slot in range(SLOTS):
            if slot not in runner.requests or draw.random() < 0.05:
                mode = draw.choice(["reasoning", "direct", "off"])
                script, known = list(draw.choice(SCRIPTS[mode])), draw.choice([0, 0, 3])
                scripts[slot] = script[known:]
                runner.begin(slot, mode, parameters(None if mode == "reasoning" else mode), script[:known])
                interrupted += bool(known)
        slots, _ = runner.step(torch.zeros(SLOTS, len(TOKENIZER)))
        for slot in slots:
            assert made.slots.states[slot] == expected_state((runner.requests[slot], runner.outputs[slot]))
            if scripts[slot]:
                runner.sampled(slot, scripts[slot].pop(0))
            else:
                del runner.requests[slot]
    assert interrupted > 5


@pytest.mark.parametrize("seed", range(3))
def test_scoring_requests_of_the_second_runner_are_forced(seed):
    made, draw = TruthScorer.__new__(TruthScorer), random.Random(seed)
    made.slots = {}
    runner, forced = SecondRunner(made, seed), 0
    for _ in range(80):
        for slot in range(SLOTS):
            if slot not in runner.requests:
                given = [draw.randrange(30) for _ in range(5)] if draw.random() < 0.6 else None
                extra = {"gream_truth": given, "gream_temperature": 0.5} if given else None
                runner.begin(slot, given, SamplingParams(max_tokens=5, extra_args=extra), [])
        logits = torch.randn(SLOTS, 30)
        slots, after = runner.step(logits)
        for row, slot in enumerate(slots):
            given, written = runner.requests[slot], len(runner.outputs[slot])
            if given is None:
                assert torch.equal(after[row], logits[row])
            else:
                assert after[row].argmax() == given[written]
                forced += 1
            runner.sampled(slot, given[written] if given else 3)
            if written == 4:
                del runner.requests[slot]
    assert forced > 40


def test_the_second_runner_must_not_guess_tokens():
    for name in (ConstrainedAnswer, TruthScorer):
        with pytest.raises(InputError, match="do not work with speculative decoding"):
            name(SimpleNamespace(speculative_config=object()), object())


@pytest.mark.parametrize("seed", range(3))
def test_scoring_requests_are_forced_wherever_vllm_moves_them(seed):
    draw, made = random.Random(seed), TruthScorer.__new__(TruthScorer)
    made.slots = {}
    torch.manual_seed(seed)
    batch: dict[int, tuple[list[int], list[int]] | None] = {}  # slot -> given tokens and those so far; None: no scoring
    forced = 0
    for _ in range(80):
        removed = [
            slot
            for slot, request in batch.items()
            if draw.random() < 0.1 or (request and not request[0][len(request[1]) :])
        ]
        for slot in removed:
            del batch[slot]
        added = []
        for slot in set(range(SLOTS)) - set(batch) - set(removed):  # vLLM names no slot twice
            if draw.random() < 0.5:
                given, output = [draw.randrange(30) for _ in range(5)], []
                scored = draw.random() < 0.6
                rest = draw.randrange(1, 6)  # an interrupted request asks for the rest
                batch[slot] = (given[-rest:], output) if scored else None
                extra = {"gream_truth": given, "gream_temperature": 0.5} if scored else None
                added.append((slot, SamplingParams(max_tokens=rest, extra_args=extra), None, output))
        moved, slots = [], list(batch)
        if len(slots) > 1 and draw.random() < 0.5:
            source, target = draw.sample(slots, 2)
            moved = [(source, target, MoveDirectionality.SWAP)]
            batch[source], batch[target] = batch[target], batch[source]
        made.update_state(BatchUpdate(SLOTS, removed, added, moved))
        logits = torch.randn(SLOTS, 30)
        after = made.apply(logits.clone())
        for slot in range(SLOTS):
            request = batch.get(slot)
            if request is None:
                assert torch.equal(after[slot], logits[slot])
                continue
            token = request[0][len(request[1])]
            assert after[slot].argmax() == token
            p = float(decompress([after[slot].log_softmax(-1)[token]])[0])
            assert p == pytest.approx(float((logits[slot] / 0.5).softmax(-1)[token]), rel=1e-4)
            request[1].append(token)
            forced += 1
    assert forced > 40


def test_a_scoring_request_asks_for_no_more_tokens_than_it_gives():
    with pytest.raises(ValueError, match=r"max_tokens is 3; expected 1 to 2, as gream_truth has"):
        TruthScorer.validate_params(SamplingParams(max_tokens=3, extra_args={"gream_truth": [1, 2]}))
