"""The `gream` command: parse, call, print. What it calls is imported only when it is called."""

from __future__ import annotations

import errno
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from gream_verl.cli import enrich, mix  # noqa: F401 - they add commands to data_app
from gream_verl.cli.common import SeedOption, console
from gream_verl.cli.data import Source, data_app
from gream_verl.cli.evaluate import evaluate_app
from gream_verl.cli.index import index_app
from gream_verl.cli.model import model_app
from gream_verl.cli.sft import sft_app
from gream_verl.core.errors import InputError
from gream_verl.pipeline.quickstart import QuickstartOptions

STOPPED = 130
UNUSABLE_PLACE = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EDQUOT)
app = typer.Typer(
    help="Generative reasoning recommendation (GREAM) on stock verl, vLLM and LLaMA-Factory.\n\n"
    "`gream quickstart` runs the whole pipeline on a machine without a GPU and prints every command it runs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(data_app, name="data")
app.add_typer(index_app, name="index")
app.add_typer(model_app, name="model")
app.add_typer(sft_app, name="sft")
app.add_typer(evaluate_app)


class Trained(StrEnum):
    """What the quickstart trains."""

    tiny = "tiny"
    smollm2 = "smollm2"


class Rollout(StrEnum):
    """What generates SRPO's rollouts."""

    vllm = "vllm"
    hf_cpu = "hf_cpu"


def main() -> None:
    """Run the command; what the user can mend is one sentence, not a traceback."""
    try:
        app()
    except InputError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed; pip install 'gream-verl[pipeline,cpu]', or run `make env` in a clone")
    except OSError as error:
        if error.errno not in UNUSABLE_PLACE:
            raise
        _fail(f"{error.filename or 'the output folder'}: {error.strerror}; free some space or choose another folder")
    except SystemExit as error:
        if error.code == STOPPED:  # what typer makes of Ctrl-C
            Console(stderr=True).print("gream: stopped; call it again to go on", style="red")
        raise


def _fail(sentence: str) -> NoReturn:
    Console(stderr=True).print(f"gream: {sentence}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


@app.command()
def quickstart(
    model: Annotated[
        Trained, typer.Option(help="A tiny model, or SmolLM2-135M-Instruct, pretrained (an hour).")
    ] = Trained.tiny,
    name: Annotated[
        str | None, typer.Option(help="The run: everything is kept in runs/NAME. Default: quickstart or pretrained.")
    ] = None,
    source: Annotated[Source, typer.Option(help="Where the data come from.")] = "movielens",
    reviews: Annotated[Path | None, typer.Option(help="Amazon: reviews (JSON lines), or ratings (.csv).")] = None,
    metadata: Annotated[Path | None, typer.Option(help="Amazon: metadata of the items.")] = None,
    rollout: Annotated[Rollout, typer.Option(help="Engine of SRPO's rollouts; hf_cpu is lighter.")] = Rollout.vllm,
    seed: SeedOption = 0,
) -> None:
    """The whole pipeline: data, item index, SFT, SRPO, evaluation, report.

    Finished steps are kept: call it again after a stop, and it goes on.
    """
    from gream_verl.pipeline.quickstart import steps
    from gream_verl.pipeline.steps import Pipeline

    options = QuickstartOptions(model.value, name, source, reviews, metadata, rollout.value, seed)
    results = Pipeline(options.folder, console).run(steps(options))
    _print_result(options.folder)
    seconds = sum(result.seconds for result in results.values() if not result.reused)
    memory = max(result.memory for result in results.values())
    console.print(f"\n{seconds / 60:.1f} minutes of work, {memory / 2**30:.1f} GiB of memory at most")
    console.print(f"Report: {options.folder / 'report.html'}", style="bold green", soft_wrap=True)


@app.command()
def doctor() -> None:
    """Say what is installed, what verl has loaded and whether a GPU is seen; fail with a remedy for what is missing."""
    from gream_verl.cli.doctor import examine

    findings = examine()
    table = Table("", "subject", "found", title="gream doctor")
    for finding in findings:
        table.add_row("[green]ok" if finding.ok else "[red]missing", finding.subject, finding.detail)
    console.print(table)
    faults = [finding for finding in findings if not finding.ok]
    if faults:
        raise InputError("\n".join(f"{fault.subject}: {fault.detail}; {fault.remedy}" for fault in faults))


def _print_result(folder: Path) -> None:
    from gream_verl.core.files import read_json
    from gream_verl.evaluation.report import render_table

    console.print(render_table(read_json(folder / "metrics.json")))


if __name__ == "__main__":
    main()
