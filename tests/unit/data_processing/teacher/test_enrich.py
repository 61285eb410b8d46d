"""The teacher over a real HTTP server whose answers a script writes; integration/test_teacher.py has a real vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from aiohttp import web
from rich.console import Console
from small_data import make_data
from teacher_server import Reply, answer, scripted

from data_processing.layout import read_chains, read_user_texts
from data_processing.leaks import find_leak
from data_processing.teacher import client
from data_processing.teacher.asking import Settings
from data_processing.teacher.budget import Budget, Price
from data_processing.teacher.client import Connection
from data_processing.teacher.enrich import Enricher, Enrichment, describe
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json

SETTINGS = Settings("teacher", max_tokens=100)
QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.02)


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    return make_data(tmp_path)


def last_user_turn(body: dict[str, Any]) -> str:
    return str(body["messages"][1]["content"])


def describe_item(body: dict[str, Any]) -> Reply:
    title = last_user_turn(body).splitlines()[0].removeprefix("Title: ")
    return answer(json.dumps({"description": f"A film called {title}."}))


def think(body: dict[str, Any]) -> Reply:
    chain = {"evidence": "Films of one kind.", "preference": "Old stories.", "intent": "One more of them.", "keep": [1]}
    return answer(json.dumps(chain))


def run(
    folder: DataFolder,
    what: Any,
    script: Callable[[dict[str, Any]], Reply],
    *,
    budget: Budget | None = None,
    settings: Settings = SETTINGS,
    **options: Any,
) -> tuple[Enrichment, list[dict[str, Any]]]:
    with scripted(script) as server:
        enricher = Enricher(folder, what, settings, **options)
        made = enricher.run(Connection((server.url,), concurrency=4, attempts=2), budget or Budget(), QUIET)
        return made, server.requests


def test_items_get_the_description_the_teacher_wrote_and_are_asked_about_once(folder: DataFolder) -> None:
    items = folder.read_items()
    made, requests = run(folder, "items", describe_item)
    assert (made.usable, made.open, len(requests)) == (60, 0, 60)
    assert made.path == folder.enriched
    answers = [json.loads(line) for line in folder.teacher.read_text().splitlines()]
    assert sorted(answer["about"] for answer in answers) == sorted(items)
    enriched = folder.read_items()
    assert enriched["7"].description == f"A film called {items['7'].title}."
    assert folder.read_items(enriched=False) == items
    written = folder.enriched.read_bytes()
    again, requests = run(folder, "items", describe_item)
    assert (again.usable, requests) == (60, [])
    assert folder.enriched.read_bytes() == written


def test_the_request_has_the_form_of_the_answer_and_what_is_known(folder: DataFolder) -> None:
    settings = Settings("teacher", 77, 0.3, extra={"top_k": 5})
    _, (request,) = run(folder, "items", describe_item, settings=settings, limit=1)
    assert request["response_format"]["json_schema"]["schema"]["required"] == ["description"]
    assert (request["model"], request["max_tokens"], request["temperature"], request["top_k"]) == (
        "teacher",
        77,
        0.3,
        5,
    )
    assert "Released in 1995." in last_user_turn(request)
    _, (request,) = run(folder, "items", describe_item, settings=Settings("teacher", structure="none"), limit=1)
    assert "response_format" not in request


def test_an_unusable_answer_is_asked_again_with_what_was_wrong_and_never_becomes_text(folder: DataFolder) -> None:
    def stubborn(body: dict[str, Any]) -> Reply:
        if "Alpha Alpha Story" in last_user_turn(body):
            return answer("I enjoy high-quality items.")
        return answer("oops") if len(body["messages"]) == 2 else describe_item(body)

    made, requests = run(folder, "items", stubborn, limit=60)
    assert made.usable == 59
    assert made.dropped == {"form": 1}
    assert made.faults == {"form": 59 + 3}
    assert len(requests) == 2 * 59 + 3
    longest = max(requests, key=lambda body: len(body["messages"]))
    assert [turn["role"] for turn in longest["messages"]] == ["system", "user", *["assistant", "user"] * 2]
    assert "it holds no JSON object" in longest["messages"][-1]["content"]
    assert "high-quality" not in folder.enriched.read_text()
    _, requests = run(folder, "items", stubborn, limit=60)
    assert requests == []


def test_failed_and_refused_calls_are_counted_and_asked_in_the_next_run(folder: DataFolder) -> None:
    def ill(body: dict[str, Any]) -> Reply:
        title = last_user_turn(body).splitlines()[0]
        if "Alpha Bravo" in title:
            return web.Response(status=500)
        if "Alpha Charlie" in title:
            return web.json_response({"error": {"message": "too long"}}, status=400)
        return describe_item(body)

    made, _ = run(folder, "items", ill)
    assert (made.usable, made.open, made.asked.failed) == (58, 2, 1)
    assert "too long" in next(iter(made.asked.refused))
    assert set(json.loads(folder.enriched.read_text())) == set(folder.read_items()) - {"1", "2"}
    assert "too long" in str(json.loads(folder.enrichment("items").read_text())["refused"])
    made, requests = run(folder, "items", describe_item)
    assert (made.usable, len(requests)) == (60, 2)
    report = describe(made, Budget())
    assert report["still to ask"] == 0
    assert json.loads(folder.enrichment("items").read_text())["usable"] == 60


def test_a_server_that_answers_nothing_ends_the_run_and_what_was_answered_is_written(folder: DataFolder) -> None:
    run(folder, "items", describe_item, limit=10)
    with pytest.raises(InputError, match=r"20 requests in a row were not answered.*/v1/chat/completions: 500\."):
        run(folder, "items", lambda body: web.Response(status=500))
    assert len(json.loads(folder.enriched.read_text())) == 10


def test_a_wrong_key_ends_the_run_at_once(folder: DataFolder) -> None:
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        run(folder, "items", lambda body: web.Response(status=401))


def test_the_budget_ends_the_run_before_it_is_exceeded_and_a_larger_one_goes_on(folder: DataFolder) -> None:
    price = Price(1, 1)
    small = Budget(tokens=700, price=price)
    made, requests = run(folder, "items", describe_item, budget=small)
    assert made.asked.budget_spent
    assert 0 < made.usable < 60
    assert made.usable + made.open == 60
    assert small.prompt_tokens + small.completion_tokens == 15 * made.usable <= 700
    _, nothing = run(folder, "items", describe_item, budget=Budget(tokens=1, price=price))
    assert nothing == []
    large, more = run(folder, "items", describe_item, budget=Budget(tokens=10**6))
    assert large.usable == 60
    assert len(requests) + len(more) == 60


def test_the_estimate_asks_nothing_and_leaves_out_what_is_answered(folder: DataFolder) -> None:
    enricher = Enricher(folder, "items", SETTINGS)
    before = enricher.estimate(Budget(price=Price(1, 2)))
    assert not folder.teacher.exists()
    assert (before.questions, before.answered, before.most_tokens) == (60, 0, 6000)
    assert before.most_money == pytest.approx((before.prompt_tokens + 12_000) / 1e6, rel=1e-3)
    run(folder, "items", describe_item, limit=20)
    after = enricher.estimate(Budget())
    assert (after.answered, after.most_tokens) == (20, 4000)


def test_two_equal_requests_are_one(folder: DataFolder) -> None:
    items = {key: {"title": "The same"} for key in map(str, range(60))}
    write_json(folder.item, items)
    made, requests = run(folder, "items", describe_item)
    assert (made.usable, len(requests)) == (60, 1)


def test_chains_are_made_of_what_the_teacher_wrote_and_name_no_target(folder: DataFolder) -> None:
    items = folder.read_items()
    sequences, index = folder.read_training(items), folder.read_index(items)

    def leaky(body: dict[str, Any]) -> Reply:
        """Name the target in the first round; of three items, always."""
        target = last_user_turn(body).rpartition("(never to be named):\n")[2].splitlines()[0].partition(" (")[0]
        if len(body["messages"]) == 2 or target in ("Alpha Charlie Story", "Bravo Bravo Story", "Charlie Alpha Story"):
            chain = {"evidence": "Films.", "preference": "Old.", "intent": f"It is {target}!", "keep": [1]}
            return answer(json.dumps(chain))
        return think(body)

    made, _ = run(folder, "chains", leaky, history=6)
    chains = read_chains(folder, sequences, index, 6)
    assert made.usable == len(chains) > 20
    assert 0 < made.dropped["leak"] < 20
    assert made.leaks > 0.4
    for (user, position), response in chains.items():
        history = sequences[user][max(position - 6, 0) : position]
        assert 4 <= position < len(sequences[user])
        target = sequences[user][position]
        assert response == (
            "<think>Films of one kind. Old stories. One more of them.</think>"
            f"{index.text(history[0])}<answer>{index.text(target)}</answer>"
        )
        assert find_leak(response, title=items[target].title, sid=index.sids[target]) is None
    assert pq.read_table(folder.chains)["history"].to_pylist() == [min(position, 6) for _, position in chains]


def test_the_teacher_is_shown_titles_of_the_history_and_no_held_out_item(folder: DataFolder) -> None:
    items = folder.read_items()
    held_out = {item for sequence in folder.read_inter(items).values() for item in sequence[-2:]}
    for what in ("users", "chains"):
        _, requests = run(folder, what, lambda body: answer("no"))
        assert requests
        for request in requests:
            text = json.dumps(request["messages"])
            assert not any(items[item].title in text for item in held_out)
            assert "1. " in last_user_turn(request)


def test_an_item_that_is_not_there_cannot_be_kept(folder: DataFolder) -> None:
    def beyond(body: dict[str, Any]) -> Reply:
        chain = {"evidence": "Films.", "preference": "Old.", "intent": "More.", "keep": [1, 40]}
        return answer(json.dumps(chain))

    made, _ = run(folder, "chains", beyond, limit=3)
    assert (made.usable, made.dropped, made.path) == (0, {"form": 3}, None)
    assert not folder.chains.exists()


def test_users_get_preferences_and_searches_that_do_not_name_the_item(folder: DataFolder) -> None:
    def shop(body: dict[str, Any]) -> Reply:
        target = last_user_turn(body).rpartition("Next item:\n")[2].splitlines()[0].partition(" (")[0]
        query = target if len(body["messages"]) == 2 else "a film of that kind"
        return answer(json.dumps({"preferences": ["Likes films."], "queries": [query]}))

    made, _ = run(folder, "users", shop)
    preferences, queries = read_user_texts(folder, folder.read_training())
    assert made.usable == len(preferences) == made.faults["leak"] > 5
    assert set(map(tuple, queries.values())) == {("a film of that kind",)}


def test_a_file_of_users_that_is_something_else_is_not_overwritten(folder: DataFolder) -> None:
    write_json(folder.user_texts, {"0": "A1YJEY40YUW4SE"})
    assert read_user_texts(folder, {}) == ({}, {})
    texts = '{"preferences": ["Likes films."], "queries": ["a film"]}'
    with pytest.raises(InputError, match="holds something else"):
        run(folder, "users", lambda body: answer(texts), limit=2)


def test_chains_of_other_data_are_refused(folder: DataFolder) -> None:
    run(folder, "chains", think)
    sequences = folder.read_training()
    index = folder.read_index(folder.read_items())
    changed = {user: sequence[1:] for user, sequence in sequences.items()}
    with pytest.raises(
        InputError, match=r"small-chains\.parquet: row 1: user .* has no item .* with `gream data enrich chains"
    ):
        read_chains(folder, changed, index, 20)
    folder.chains.write_text("no parquet")
    with pytest.raises(InputError, match="not a file of chains"):
        read_chains(folder, sequences, index, 20)


def test_a_limit_keeps_the_questions_of_a_lower_one(folder: DataFolder) -> None:
    _, few = run(folder, "chains", think, limit=5)
    _, more = run(folder, "chains", think, limit=12)
    assert (len(few), len(more)) == (5, 7)


def test_edited_prompts_are_new_questions(folder: DataFolder, tmp_path: Path) -> None:
    from data_processing.teacher.templates import write_prompts

    run(folder, "items", describe_item, limit=3)
    write_prompts(tmp_path / "mine")
    (tmp_path / "mine" / "item.txt").write_text("Describe.\n---\nTitle: $title")
    _, requests = run(folder, "items", describe_item, limit=3, prompts=tmp_path / "mine")
    assert [request["messages"][0]["content"] for request in requests] == ["Describe."] * 3


def test_reviews_are_shown_to_the_teacher(folder: DataFolder) -> None:
    import polars as pl

    pl.DataFrame({"item": ["7", "7", "8"], "text": ["Great war film", "Too long", "Nice"]}).write_parquet(
        folder.reviews
    )
    _, requests = run(folder, "items", describe_item)
    shown = {last_user_turn(body).splitlines()[0]: last_user_turn(body) for body in requests}
    title = folder.read_items()["7"].title
    assert shown[f"Title: {title}"].endswith("Buyers say:\n- Great war film\n- Too long")


def test_equal_questions_after_a_failure_are_still_one_request_at_a_time(folder: DataFolder) -> None:
    write_json(folder.item, {key: {"title": "The same"} for key in map(str, range(60))})
    left = iter(range(2))

    def fails_twice(body: dict[str, Any]) -> Reply:
        return web.Response(status=500) if next(left, None) is not None else describe_item(body)

    made, requests = run(folder, "items", fails_twice)
    assert made.asked.answers == 1
    assert len(requests) == 3
    assert (made.usable, made.asked.failed) == (60, 4)  # the four that waited for the request that failed
    again, requests = run(folder, "items", describe_item)
    assert (again.usable, requests) == (60, [])


def test_one_request_that_fails_for_many_questions_is_one_failure(folder: DataFolder) -> None:
    write_json(folder.item, {key: {"title": "The same"} for key in map(str, range(60))})
    with scripted(lambda body: web.Response(status=500)) as server:
        enricher = Enricher(folder, "items", SETTINGS)
        made = enricher.run(Connection((server.url,), concurrency=60, attempts=1), Budget(), QUIET)
    assert (made.asked.failed, len(server.requests)) == (60, 1)


def test_refusals_that_are_left_do_not_end_a_later_run(folder: DataFolder) -> None:
    def picky(body: dict[str, Any]) -> Reply:
        title = last_user_turn(body).splitlines()[0]
        if any(f" {word} Story" in title for word in ("Alpha", "Bravo", "Charlie", "Delta", "Echo")):
            reason = f"this has {len(title)} tokens [too many/1]"
            return web.json_response({"error": {"message": reason}}, status=400)
        return describe_item(body)

    for _ in range(2):
        made, _ = run(folder, "items", picky)
        assert (made.usable, made.open) == (30, 30)
        assert made.asked.refused == {"# this has # tokens [too many/#]": 30}


def test_a_server_that_refuses_everything_ends_the_run(folder: DataFolder) -> None:
    reply = {"error": {"message": "response_format is not known"}}
    with pytest.raises(InputError, match=r"all of the first 20 requests: 400 response_format .*--structure none"):
        run(folder, "items", lambda body: web.json_response(reply, status=400))


def test_a_run_that_is_broken_off_replaces_no_larger_file(folder: DataFolder) -> None:
    run(folder, "items", describe_item)
    whole = folder.enriched.read_bytes()
    left = iter(range(5))

    def dies(body: dict[str, Any]) -> Reply:
        return describe_item(body) if next(left, None) is not None else web.Response(status=500)

    with pytest.raises(InputError, match="in a row"):
        run(folder, "items", dies, settings=Settings("another"))
    assert folder.enriched.read_bytes() == whole
    made, _ = run(folder, "items", describe_item, settings=Settings("another"))
    assert (made.before, made.usable) == (60, 60)


def test_texts_of_another_split_or_history_are_refused(folder: DataFolder) -> None:
    texts = '{"preferences": ["Likes films."], "queries": ["a film"]}'
    run(folder, "users", lambda body: answer(texts))
    run(folder, "chains", think, history=20)
    training, index = folder.read_training(), folder.read_index(folder.read_items())
    assert read_user_texts(folder, training)[0]
    shorter = {user: part[:-1] for user, part in training.items()}
    with pytest.raises(InputError, match="was written when the last item for training was"):
        read_user_texts(folder, shorter)
    assert read_chains(folder, training, index, 20)
    with pytest.raises(InputError, match="row 1: was written for 4 items, not for 3; use the --history"):
        read_chains(folder, training, index, 3)


def test_nobody_to_ask_is_one_sentence(folder: DataFolder) -> None:
    write_json(folder.inter, {"0": ["1", "2", "3"]})
    for what, said in (("users", "no user has two interactions for training"), ("chains", "no user has 5")):
        with pytest.raises(InputError, match=said):
            Enricher(folder, what, SETTINGS)
