"""The `gream` command: parse, call, print. Frameworks are imported only inside the command that needs them."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer import Option, Typer

from gream_verl.cli import enrich, mix  # noqa: F401 - they add commands to data_app
from gream_verl.cli.common import Run, Seed, console
from gream_verl.cli.data import data_app
from gream_verl.cli.evaluate import evaluate_app
from gream_verl.cli.index import index_app
from gream_verl.cli.model import model_app
from gream_verl.cli.serve import serve_app
from gream_verl.cli.sft import sft_app
from gream_verl.core.errors import InputError
from gream_verl.pipeline.quickstart import TINY, Quickstart, QuickstartSource

STOPPED = 130
"""Exit status after Ctrl-C."""
UNUSABLE_FOLDER = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EDQUOT)
app = Typer(
    help="Generative reasoning recommendation (GREAM) on stock verl.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)


def main() -> None:
    """Run the command; print an error that the user can repair as one sentence."""
    try:
        app()
    except InputError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed; pip install 'gream-verl[pipeline,cpu]', or run `make env` in a clone")
    except OSError as error:
        if error.errno not in UNUSABLE_FOLDER:
            raise
        _fail(f"{error.filename or 'the output folder'}: {error.strerror}; free some space or choose another folder")
    except SystemExit as error:
        if error.code == STOPPED:
            Console(stderr=True).print("gream: stopped; run it again to go on", style="red")
        raise


def _fail(sentence: str) -> NoReturn:
    Console(stderr=True).print(f"gream: {sentence}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


@app.command()
def quickstart(
    run: Run = TINY.run,
    source: Annotated[QuickstartSource, Option(help="Format of the raw data.")] = "movielens",
    interactions: Annotated[Path | None, Option(help="As for `gream data prepare`.")] = None,
    items: Annotated[Path | None, Option(help="As for `gream data prepare`.")] = None,
    base: Annotated[str | None, Option(help="Pretrained model, name or folder. Default: a tiny new one.")] = None,
    template: Annotated[str | None, Option(help="LLaMA-Factory's template of --base. Default: smollm2.")] = None,
    seed: Seed = 0,
) -> None:
    """Run the whole pipeline, from raw data to the report.

    It prints every command and keeps finished steps: run it again after a stop, and it goes on.
    """
    from gream_verl.pipeline.quickstart import quickstart_steps
    from gream_verl.pipeline.runner import run_steps

    run_steps(run, quickstart_steps(Quickstart(run, source, interactions, items, base, template, seed)), console)
    console.print(f"Report: {run / 'report.html'}", style="bold green", soft_wrap=True)


@app.command()
def doctor() -> None:
    """Check versions, verl's plugins and the accelerator.

    It fails with a remedy for each fault.
    """
    from gream_verl.cli.doctor import examine

    findings = examine()
    table = Table("", "subject", "found", title="gream doctor")
    for finding in findings:
        table.add_row("[red]fault" if finding.remedy else "[green]ok", finding.subject, escape(finding.state))
    console.print(table)
    if faults := [finding for finding in findings if finding.remedy]:
        raise InputError("\n".join(f"{fault.subject}: {fault.state}; {fault.remedy}" for fault in faults))


app.add_typer(data_app, name="data")
app.add_typer(index_app, name="index")
app.add_typer(model_app, name="model")
app.add_typer(sft_app, name="sft")
app.add_typer(evaluate_app)
app.add_typer(serve_app)

if __name__ == "__main__":
    main()
