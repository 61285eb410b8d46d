"""`gream data enrich|prompts`: a language model writes texts and chains of thought."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gream_verl.cli.common import (
    DEFAULT_DATA,
    DataOption,
    DatasetOption,
    HistoryOption,
    SeedOption,
    console,
    print_dict,
)
from gream_verl.cli.data import data_app
from gream_verl.pipeline.quickstart import DEFAULT_DATASET


class Written(StrEnum):
    """What a teacher can write."""

    items = "items"
    users = "users"
    chains = "chains"


class Structure(StrEnum):
    """How a server is told the form of an answer."""

    json_schema = "json_schema"
    json_object = "json_object"
    none = "none"


@data_app.command()
def enrich(
    what: Annotated[
        Written,
        typer.Argument(
            help="Descriptions of items, tastes and searches of users, or chains of thought.", metavar="WHAT"
        ),
    ],
    model: Annotated[str, typer.Option(help="The teacher: a model, as the server calls it.")],
    endpoint: Annotated[
        list[str], typer.Option(help="Base URL of a server that speaks the OpenAI API; repeat it for several.")
    ],
    data: DataOption = DEFAULT_DATA,
    dataset: DatasetOption = DEFAULT_DATASET,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask about a seeded sample of so many. Default: all.")
    ] = None,
    history: HistoryOption = 20,
    prompts: Annotated[
        Path | None, typer.Option(help="Folder of your own prompts, see `gream data prompts`. Default: ours.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the estimate and ask nothing.")] = False,
    budget_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens, prompts and answers, all runs of this data set together.")
    ] = None,
    budget_money: Annotated[
        float | None, typer.Option(min=0, help="Most money, all runs of this data set together; needs --price.")
    ] = None,
    price: Annotated[
        str, typer.Option(help="Money for a million tokens of prompt and of answer, as 0.15/0.60.")
    ] = "0/0",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once, over all endpoints.")] = 32,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until an attempt is given up.")] = 120.0,
    attempts: Annotated[int, typer.Option(min=1, help="Attempts for a request that a server fails to answer.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Times a question is asked until an answer can be used.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="Of the teacher's sampling.")] = 0.7,
    structure: Annotated[
        Structure, typer.Option(help="How the server is told the form of an answer; none: by the prompt alone.")
    ] = Structure.json_schema,
    extra: Annotated[
        str | None,
        typer.Option(
            help='More fields of a request, as JSON: \'{"chat_template_kwargs": {"enable_thinking": false}}\'.'
        ),
    ] = None,
    key_variable: Annotated[str, typer.Option(help="Environment variable that holds the API key.")] = "OPENAI_API_KEY",
    seed: SeedOption = 0,
) -> None:
    """Let a language model write: D.enriched.json (items), D.user.json (users) or D-chains.parquet (chains).

    Later steps use what is there; without it, rules write. Every answer is kept in D.teacher.jsonl: call it again after
    a stop, and only what is missing is asked.
    """
    from data_processing.teacher.asking import Settings, read_extra
    from data_processing.teacher.budget import Budget, Price
    from data_processing.teacher.client import Connection
    from data_processing.teacher.enrich import Enricher, describe
    from gream_verl.core.data_folder import DataFolder

    settings = Settings(model, max_tokens, temperature, structure.value, rounds, read_extra(extra))
    key = os.environ.get(key_variable, "").strip()
    connection = Connection(tuple(endpoint), key_variable, key, concurrency, timeout, attempts)
    budget = Budget(budget_tokens, budget_money, Price.parse(price))
    enricher = Enricher(DataFolder(data, dataset), what.value, settings, prompts, limit, history, seed)
    print_dict("To ask, before any answer has to be asked again", vars(enricher.estimate(budget)))
    if dry_run:
        return
    made = enricher.run(connection, budget, console)
    print_dict(f"The teacher's {what.value}", describe(made, budget))
    if made.asked.budget_spent:
        console.print("The budget is spent; call it again with a larger one, and it goes on.", style="yellow")


@data_app.command()
def prompts(folder: Annotated[Path, typer.Argument(help="Where to write them; files that are there stay.")]) -> None:
    """Write the teacher's prompts to a folder, to be edited and given to `gream data enrich --prompts`."""
    from data_processing.teacher.templates import write_prompts

    for path in write_prompts(folder):
        console.print(str(path), soft_wrap=True, highlight=False)
