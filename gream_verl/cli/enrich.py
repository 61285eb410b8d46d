"""`gream data enrich|prompts`: a language model writes texts and chains of thought."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from gream_verl.cli.common import Config, Dataset, DryRun, History, Run, Seed, console, print_dict
from gream_verl.cli.data import data_app
from gream_verl.core.options import file_options
from gream_verl.core.run_folder import RunFolder

What = Literal["items", "users", "chains"]
Structure = Literal["json_schema", "json_object", "none"]


@data_app.command()
def enrich(
    run: Run,
    what: Annotated[What, Argument(help="Texts of items, tastes and searches of users, or chains of thought.")],
    model: Annotated[str | None, Option(help="The teacher: a model, as the server calls it.")] = None,
    endpoint: Annotated[str | None, Option(help="Base URL of a server that speaks the OpenAI API.")] = None,
    config: Config = None,
    structure: Annotated[Structure | None, Option(help="Form of an answer. Default: json_schema.")] = None,
    concurrency: Annotated[int | None, Option(min=1, help="Requests in flight at once. Default: 32.")] = None,
    limit: Annotated[int | None, Option(min=1, help="Size of a seeded sample to ask about. Default: all.")] = None,
    history: History = 20,
    prompts: Annotated[Path | None, Option(help="Folder of your own prompts, see `gream data prompts`.")] = None,
    budget_tokens: Annotated[int | None, Option(min=1, help="Most tokens of all runs of this data set.")] = None,
    dry_run: DryRun = False,
    seed: Seed = 0,
    dataset: Dataset = None,
) -> None:
    """Let a language model write texts or chains of thought.

    It writes D.enriched.json (items), D.user.json (users) or D-chains.parquet (chains). Later steps use these files;
    without them, rules write. D.teacher.sqlite keeps every answer: call it again after a stop, and it asks only for
    those that are missing.
    """
    from data_processing.teacher.enrich import Enricher, Teacher
    from data_processing.teacher.questions import Questions
    from data_processing.teacher.store import AnswerStore

    given = {"model": model, "endpoint": endpoint, "structure": structure, "concurrency": concurrency}
    teacher = file_options(Teacher, config, given, "gream data enrich")
    questions = Questions(RunFolder.open(run, dataset).data, what, prompts, limit, history, seed)
    answers = questions.folder.teacher
    with closing(AnswerStore(":memory:" if dry_run and not answers.exists() else answers)) as store:
        enricher = Enricher(questions, teacher, store, budget_tokens)
        print_dict("To ask, before any answer has to be asked again", enricher.estimate())
        if not dry_run:
            print_dict(f"The teacher's {what}", report := enricher.run(console))
            if report["budget spent"]:
                console.print("The budget is spent; call it again with a larger one to go on.", style="yellow")


@data_app.command()
def prompts(folder: Annotated[Path, Argument(help="Folder to write to; existing files stay.")]) -> None:
    """Write the teacher's prompts to a folder, to be edited.

    `gream data enrich --prompts` takes the folder.
    """
    from data_processing.teacher.templates import write_prompts

    for path in write_prompts(folder):
        console.print(str(path), soft_wrap=True, highlight=False)
