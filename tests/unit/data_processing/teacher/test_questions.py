from __future__ import annotations

import json
from typing import Any

import pytest

from data_processing.teacher.questions import FORMS, Question, UnusableError, json_schema
from gream_verl.core.data_folder import Item

ItemText, UserTexts, Chain = (FORMS[what] for what in ("items", "users", "chains"))
CHAIN = {"evidence": "Two westerns.", "preference": "Old films.", "intent": "One more of the kind.", "keep": [1, 3]}
PAST = [Item("Shane"), Item("Jaws"), Item("The Searchers")]


def fault(text: str, finish: str = "stop", **question: Any) -> tuple[str, str]:
    with pytest.raises(UnusableError) as caught:
        Question([], **({"form": ItemText} | question)).read(text, finish)
    return caught.value.args


@pytest.mark.parametrize(
    "text",
    [
        '{"description": "A  red\\n nail polish."}',
        '```json\n{"description": "A red nail polish."}\n```',
        '<think>The user {wants} JSON</think>\n{"description": "A red nail polish."} I hope that helps.',
    ],
)
def test_an_answer_is_read_through_what_models_put_around_it(text: str) -> None:
    assert Question([], ItemText).read(text, "stop").description == "A red nail polish."


def test_chains_and_user_texts_name_what_the_user_had_but_not_the_next_item() -> None:
    texts = '{"preferences": ["Likes The Searchers."], "queries": ["a western as dark as Rio Bravo"]}'
    assert Question([], UserTexts, PAST, Item("Red River")).read(texts, "stop").preferences == ["Likes The Searchers."]
    assert fault(texts, form=UserTexts, past=PAST, target=Item("Rio Bravo"))[0] == "leak"
    assert Question([], Chain, PAST, Item("Red River")).read(json.dumps(CHAIN), "stop").keep == [1, 3]
    leak = json.dumps(CHAIN | {"evidence": "Next comes Red River."})
    assert fault(leak, form=Chain, past=PAST, target=Item("Red River"))[0] == "leak"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("I enjoy high-quality items.", "no JSON object"),
        ("{", "no JSON object"),
        ('{"description": }', "JSON"),
        ('{"text": "A red nail polish."}', "description: Field required"),
        ('{"description": "A red nail polish.", "score": 1}', "score: Extra inputs"),
        ('{"description": ""}', "description: String should have at least 3"),
        ('{"description": "..."}', "must hold words"),
        ('{"description": "x <answer>y</answer>"}', "without tags"),
        ('{"description": "It is <|a_12|><|b_7|>"}', "without tags or identifiers"),
        ('{"description": 5}', "description: Input should be a valid string"),
    ],
)
def test_an_answer_of_another_form_is_unusable_and_the_reason_is_said(text: str, said: str) -> None:
    kind, reason = fault(text)
    assert kind == "form"
    assert said in reason


def test_an_answer_that_was_cut_is_not_read_even_when_it_looks_whole() -> None:
    assert fault('{"description": "A red nail polish."}', "length")[0] == "cut"


@pytest.mark.parametrize("keep", [[], [0], [-1], ["x"], [1] * 60, [1, 4]])
def test_kept_items_are_numbers_of_the_history(keep: list[object]) -> None:
    assert fault(json.dumps(CHAIN | {"keep": keep}), form=Chain, past=PAST)[0] == "form"


def test_the_schema_of_a_request_is_pinned_for_a_change_of_it_asks_everything_again() -> None:
    assert json_schema(ItemText) == {
        "additionalProperties": False,
        "properties": {"description": {"maxLength": 1000, "minLength": 3, "type": "string"}},
        "required": ["description"],
        "type": "object",
    }
    text = {"maxLength": 500, "minLength": 3, "type": "string"}
    keep = {"items": {"minimum": 1, "type": "integer"}, "maxItems": 50, "minItems": 1, "type": "array"}
    assert json_schema(Chain)["properties"] == {"evidence": text, "preference": text, "intent": text, "keep": keep}
