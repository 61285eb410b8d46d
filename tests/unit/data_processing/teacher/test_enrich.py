"""The teacher over a real HTTP server whose answers a script writes; integration/test_teacher.py has a real vLLM."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import polars as pl
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from rich.console import Console
from small_data import make_data
from teacher_server import Reply, answer, scripted

from data_processing.layout import read_chains, read_user_texts
from data_processing.leaks import find_leak
from data_processing.teacher.enrich import Enricher, Teacher
from data_processing.teacher.questions import Questions
from data_processing.teacher.store import AnswerStore
from data_processing.teacher.templates import write_prompts
from gream_verl.core import openai_client
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json

Script = Callable[[dict[str, Any]], Reply]
TEXTS = '{"preferences": ["Likes films."], "queries": ["a film"]}'


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "FIRST_WAIT", 0.002)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    return make_data(tmp_path, items=30)


def last_user_turn(body: dict[str, Any]) -> str:
    return str(body["messages"][1]["content"])


def describe_item(body: dict[str, Any]) -> Reply:
    title = last_user_turn(body).splitlines()[0].removeprefix("Title: ")
    return answer(json.dumps({"description": f"A film called {title}."}))


def think(body: dict[str, Any]) -> Reply:
    chain = {"evidence": "Films of one kind.", "preference": "Old stories.", "intent": "One more of them.", "keep": [1]}
    return answer(json.dumps(chain))


def make(folder: DataFolder, what: Any, endpoint: str, budget: int | None = None, **options: Any) -> Enricher:
    settings = {name: options.pop(name) for name in list(options) if name in Teacher.model_fields}
    teacher = Teacher(
        **{"model": "m", "max_tokens": 100, "concurrency": 4, "attempts": 2} | settings, endpoint=endpoint
    )
    return Enricher(Questions(folder, what, **options), teacher, AnswerStore(folder.teacher), budget)


def run(folder: DataFolder, what: Any, script: Script, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the report of a run and the requests that it made."""
    with scripted(script) as server:
        enricher = make(folder, what, server.url, **options)
        with closing(enricher.store):
            return enricher.run(Console(quiet=True)), server.requests


def test_items_get_the_description_the_teacher_wrote_and_are_asked_about_once(folder: DataFolder) -> None:
    items = folder.read_items()
    report, requests = run(folder, "items", describe_item)
    assert (report["usable"], report["without a text"], len(requests)) == (30, {}, 30)
    assert report["tokens of all runs"] == {"prompts": 300, "answers": 150}
    assert json.loads(folder.enrichment("items").read_text()) == report
    with closing(sqlite3.connect(folder.teacher)) as answers:
        assert sorted(subject for (subject,) in answers.execute("SELECT subject FROM answers")) == sorted(items)
    assert folder.read_items()["7"].description == f"A film called {items['7'].title}."
    assert folder.read_items(enriched=False) == items
    written = folder.enriched.read_bytes()
    again, requests = run(folder, "items", describe_item)
    assert (again["usable"], again["answered now"], requests) == (30, 0, [])
    assert folder.enriched.read_bytes() == written


def test_a_request_holds_the_form_of_the_answer_the_settings_and_what_is_known(folder: DataFolder) -> None:
    pl.DataFrame({"item": ["7", "7"], "text": ["Great war film", "Too long"]}).write_parquet(folder.reviews)
    _, requests = run(folder, "items", describe_item, max_tokens=77, temperature=0.3, extra={"top_k": 5})
    shown = {last_user_turn(body).splitlines()[0]: body for body in requests}
    request = shown[f"Title: {folder.read_items()['7'].title}"]
    assert last_user_turn(request).endswith("Buyers say:\n- Great war film\n- Too long")
    assert "Released in 1995." in last_user_turn(request)
    assert request["response_format"]["json_schema"]["schema"]["required"] == ["description"]
    expected = {"model": "m", "max_tokens": 77, "temperature": 0.3, "top_k": 5}
    assert {name: request[name] for name in expected} == expected
    _, (request,) = run(folder, "items", describe_item, structure="json_object", limit=1)
    assert request["response_format"] == {"type": "json_object"}
    _, (request,) = run(folder, "items", describe_item, structure="none", limit=1)
    assert "response_format" not in request


def test_an_unusable_answer_is_asked_again_with_the_reason_and_never_becomes_text(folder: DataFolder) -> None:
    def stubborn(body: dict[str, Any]) -> Reply:
        if "Alpha Alpha Story" in last_user_turn(body):
            return answer("I enjoy high-quality items.")
        return answer("oops") if len(body["messages"]) == 2 else describe_item(body)

    report, requests = run(folder, "items", stubborn)
    assert report["usable"] == 29
    assert report["without a text"] == {"dropped: form": 1}
    assert report["unusable answers"] == {"form": 29 + 3}
    assert len(requests) == 2 * 29 + 3
    longest = max(requests, key=lambda body: len(body["messages"]))
    assert [turn["role"] for turn in longest["messages"]] == ["system", "user", *["assistant", "user"] * 2]
    assert "it holds no JSON object" in longest["messages"][-1]["content"]
    assert "high-quality" not in folder.enriched.read_text()
    assert run(folder, "items", stubborn)[1] == []


def test_failed_and_refused_requests_are_counted_and_asked_in_the_next_run(folder: DataFolder) -> None:
    def ill(body: dict[str, Any]) -> Reply:
        title = last_user_turn(body).splitlines()[0]
        if "Alpha Bravo" in title:
            return web.Response(status=500)
        if "Alpha Charlie" in title:
            return web.json_response({"error": {"message": "5123 tokens are too long"}}, status=400)
        return describe_item(body)

    report, _ = run(folder, "items", ill)
    assert (report["usable"], report["without a text"]) == (28, {"still to ask": 2})
    assert sorted(report["not answered"].values()) == [1, 1]
    assert "# tokens are too long" in str(report["not answered"])
    assert set(json.loads(folder.enriched.read_text())) == set(folder.read_items()) - {"1", "2"}
    report, requests = run(folder, "items", describe_item)
    assert (report["usable"], len(requests)) == (30, 2)


def test_a_server_that_stops_to_answer_ends_the_run_and_replaces_no_file(folder: DataFolder) -> None:
    left = iter(range(10))

    def dies(body: dict[str, Any]) -> Reply:
        return describe_item(body) if next(left, None) is not None else web.Response(status=500)

    with pytest.raises(InputError, match=r"20 requests in a row were not answered.*/v1: Error code: 500"):
        run(folder, "items", dies)
    written = folder.enriched.read_bytes()
    assert len(json.loads(written)) == 10
    left = iter(range(5))
    with pytest.raises(InputError, match="in a row"):
        run(folder, "items", dies, model="another")
    assert folder.enriched.read_bytes() == written
    assert run(folder, "items", describe_item, model="another")[0]["answered now"] == 25


def test_a_wrong_key_ends_the_run_at_once(folder: DataFolder) -> None:
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        run(folder, "items", lambda body: web.Response(status=401))


def test_a_server_that_refuses_everything_ends_the_run_one_that_refuses_much_does_not(folder: DataFolder) -> None:
    def picky(body: dict[str, Any]) -> Reply:
        return think(body) if "Title: Alpha Alpha" in last_user_turn(body) else web.Response(status=400)

    with pytest.raises(InputError, match=r"400.*--structure none"):
        run(folder, "items", lambda body: web.Response(status=400))
    for _ in range(2):
        report, _ = run(folder, "items", picky, rounds=1)
        assert report["without a text"] == {"dropped: form": 1, "still to ask": 29}


def test_the_budget_ends_the_run_before_it_is_exceeded_and_a_larger_one_goes_on(folder: DataFolder) -> None:
    enricher = make(folder, "items", "http://x")
    with closing(enricher.store):
        longest = len(json.dumps(enricher.follow("0")[2])) + 200
    small, requests = run(folder, "items", describe_item, budget=longest + 300, concurrency=32)
    assert small["budget spent"]
    assert small["usable"] == len(requests) < 30
    assert 300 <= sum(small["tokens of all runs"].values()) == 15 * len(requests) <= longest + 300
    assert run(folder, "items", describe_item, budget=1)[1] == []
    large, more = run(folder, "items", describe_item, budget=10**6)
    assert (large["usable"], len(requests) + len(more)) == (30, 30)


def test_the_estimate_asks_nothing_and_leaves_out_what_is_answered(folder: DataFolder) -> None:
    run(folder, "items", describe_item, limit=20)
    enricher = make(folder, "items", "http://127.0.0.1:9/v1")
    with closing(enricher.store):
        estimate = enricher.estimate()
    assert (estimate["questions"], estimate["to ask"], estimate["answer tokens, at most"]) == (30, 10, 1000)
    assert 10 * 100 < estimate["prompt tokens, about"] < 10 * 300


def test_chains_are_made_of_what_the_teacher_wrote_and_name_no_target(folder: DataFolder) -> None:
    items = folder.read_items()
    sequences, index = folder.read_training(items), folder.read_index(items)
    asked = []

    def leaky(body: dict[str, Any]) -> Reply:
        """Name the target in the first round; of three items, always."""
        asked.append(last_user_turn(body))
        target = last_user_turn(body).rpartition("(never to be named):\n")[2].splitlines()[0].partition(" (")[0]
        if len(body["messages"]) == 2 or target in ("Alpha Charlie Story", "Bravo Bravo Story", "Charlie Alpha Story"):
            chain = {"evidence": "Films.", "preference": "Old.", "intent": f"It is {target}!", "keep": [1]}
            return answer(json.dumps(chain))
        return think(body)

    report, _ = run(folder, "chains", leaky, history=6, limit=24)
    chains = read_chains(folder, sequences, index, 6)
    assert report["usable"] == len(chains) > 12
    assert 0 < report["without a text"]["dropped: leak"] < 20
    assert report["leak rate"] > 0.4
    for (user, position), (response,) in chains.items():
        history = sequences[user][max(position - 6, 0) : position]
        assert 4 <= position < len(sequences[user])
        target = sequences[user][position]
        assert response == (
            "<think>Films of one kind. Old stories. One more of them.</think>"
            f"{index.text(history[0])}<answer>{index.text(target)}</answer>"
        )
        assert find_leak(response, title=items[target].title, sid=index.sids[target]) is None
        assert any(f"1. {items[history[0]].title}" in text and items[target].title in text for text in asked)
    assert pq.read_table(folder.chains)["history"].to_pylist() == [min(position, 6) for _, position in chains]
    held_out = [items[str(number)].title for number in range(20, 30)]
    assert not any(title in text for title in held_out for text in asked)


def test_users_get_preferences_and_searches_that_do_not_name_the_item(folder: DataFolder) -> None:
    def shop(body: dict[str, Any]) -> Reply:
        target = last_user_turn(body).rpartition("Next item:\n")[2].splitlines()[0].partition(" (")[0]
        query = target if len(body["messages"]) == 2 else "a film of that kind"
        return answer(json.dumps({"preferences": ["Likes films."], "queries": [query]}))

    report, _ = run(folder, "users", shop)
    preferences, queries = read_user_texts(folder, folder.read_training())
    assert report["usable"] == len(preferences) == report["unusable answers"]["leak"] > 5
    assert set(map(tuple, queries.values())) == {("a film of that kind",)}


def test_a_limit_keeps_the_questions_of_a_lower_one(folder: DataFolder) -> None:
    few, more, every = (Questions(folder, "chains", limit=limit).subjects for limit in (5, 12, None))
    assert (len(few), len(more)) == (5, 12)
    assert set(few) < set(more) < set(every)
    assert few == sorted(few, key=every.index)
    assert Questions(folder, "chains", limit=5, seed=1).subjects != few


def test_edited_prompts_are_new_questions(folder: DataFolder, tmp_path: Path) -> None:
    run(folder, "items", describe_item, limit=3)
    write_prompts(tmp_path / "mine")
    (tmp_path / "mine" / "item.txt").write_text("Describe.\n---\nTitle: $title")
    _, requests = run(folder, "items", describe_item, limit=3, prompts=tmp_path / "mine")
    assert [request["messages"][0]["content"] for request in requests] == ["Describe."] * 3


def test_files_of_other_data_are_refused(folder: DataFolder) -> None:
    run(folder, "users", lambda body: answer(TEXTS), limit=5)
    run(folder, "chains", think, history=20, limit=5)
    training, index = folder.read_training(), folder.read_index(folder.read_items())
    assert read_user_texts(folder, training)[0]
    assert read_chains(folder, training, index, 20)
    shorter = {user: part[1:-1] for user, part in training.items()}
    with pytest.raises(InputError, match=r"written when the last training item was .*write it again"):
        read_user_texts(folder, shorter)
    with pytest.raises(InputError, match=r"small-chains\.parquet: .* is about another item.*write it again"):
        read_chains(folder, shorter, index, 20)
    with pytest.raises(InputError, match=r"has a history of \d+ items, not 3; use that --history"):
        read_chains(folder, training, index, 3)
    folder.chains.write_text("no parquet")
    with pytest.raises(InputError, match="not a file of chains"):
        read_chains(folder, training, index, 20)
    write_json(folder.user_texts, {"user_explicit_preference": ["Likes films."]})
    with pytest.raises(InputError, match=r"expected \{'user_explicit_preference'"):
        read_user_texts(folder, training)


def test_a_file_of_users_that_is_something_else_is_not_overwritten(folder: DataFolder) -> None:
    write_json(folder.user_texts, {"0": "A1YJEY40YUW4SE"})
    assert read_user_texts(folder, {}) == ({}, {})
    with pytest.raises(InputError, match="holds something else"):
        Questions(folder, "users")


def test_a_data_set_without_subjects_is_refused(folder: DataFolder) -> None:
    write_json(folder.inter, {"0": ["1", "2", "3"]})
    for what in ("users", "chains"):
        with pytest.raises(InputError, match="no user has enough interactions for training"):
            Questions(folder, what)
