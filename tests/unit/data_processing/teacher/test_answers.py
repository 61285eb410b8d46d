from __future__ import annotations

import json

import pytest

from data_processing.teacher.answers import Chain, ItemText, UnusableError, UserTexts, json_schema, read_answer

CHAIN = {"evidence": "Two westerns.", "preference": "Old films.", "intent": "One more of the kind.", "keep": [1, 3]}


def fault(text: str, form: type = ItemText, finish: str = "stop") -> UnusableError:
    with pytest.raises(UnusableError) as caught:
        read_answer(text, finish, form)
    return caught.value


@pytest.mark.parametrize(
    "text",
    [
        '{"description": "A  red\\n nail polish."}',
        '```json\n{"description": "A red nail polish."}\n```',
        '<think>The user {wants} JSON</think>\n{"description": "A red nail polish."} I hope that helps.',
    ],
)
def test_an_answer_is_read_through_what_models_put_around_it(text: str) -> None:
    assert read_answer(text, "stop", ItemText).description == "A red nail polish."


def test_chains_and_user_texts() -> None:
    chain = read_answer(json.dumps(CHAIN), "stop", Chain)
    assert (chain.evidence, chain.keep) == ("Two westerns.", [1, 3])
    texts = read_answer('{"preferences": ["Likes war films."], "queries": ["a film on war"]}', "stop", UserTexts)
    assert texts.queries == ["a film on war"]


def test_what_was_cut_is_not_read_even_when_it_looks_whole() -> None:
    assert fault('{"description": "A red nail polish."}', finish="length").kind == "cut"


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
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    error = fault(text)
    assert error.kind == "form"
    assert said in str(error)


def test_the_schema_of_a_request_is_pinned_for_a_change_of_it_asks_everything_anew() -> None:
    assert json_schema(ItemText) == {
        "additionalProperties": False,
        "properties": {"description": {"maxLength": 1000, "minLength": 3, "type": "string"}},
        "required": ["description"],
        "type": "object",
    }
    text = {"maxLength": 500, "minLength": 3, "type": "string"}
    keep = {"items": {"minimum": 1, "type": "integer"}, "maxItems": 50, "minItems": 1, "type": "array"}
    assert json_schema(Chain)["properties"] == {"evidence": text, "preference": text, "intent": text, "keep": keep}


@pytest.mark.parametrize("keep", [[], [0], [-1], ["x"], list(range(1, 100))])
def test_kept_items_are_numbers_from_1(keep: list[object]) -> None:
    assert fault(json.dumps(CHAIN | {"keep": keep}), Chain).kind == "form"
