"""The ``qvit`` command: each subcommand a few lines that call the library."""

from __future__ import annotations

import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from qvit._version import __version__
from qvit.cli import analyze, compare, environment, packed, quantize, search, serve, train
from qvit.cli.ending import REFUSED, STOPPED, Terminated, end, ended_by_sigterm, ends_in_a_sentence
from qvit.files import printable

# Markup would take "[default: 4]" in a help text for a colour.
app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
TOGETHER = ("train", "eval", "ablate")
"""Commands that several processes run together; of every other one each process would write the same files."""
_ClickException: Any = typer.BadParameter.__mro__[2]  # click's, or that of the copy of click in a later typer


def print_version(wanted: bool) -> None:
    """Print the version and end, if it is ``wanted``."""
    if wanted:
        print(f"qvit {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Vision transformers at 4, 3 and 2 bits: train them with Q-ViT, fully quantized, and measure them."""
    name = context.invoked_subcommand
    if name is None:  # click prints the help too, and in its older versions ends with status 0
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(REFUSED)
    if name not in TOGETHER and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        end(f"qvit {name} runs in one process: start it without torchrun or accelerate launch.", REFUSED)


def help_text(command: Callable[..., None]) -> str:
    """Return a command's docstring, whose examples keep their lines; ``python -OO`` keeps none."""
    return (inspect.getdoc(command) or "").replace("\nExample", "\n\b\nExample")


for command in (
    quantize.quantize,
    search.search_bits,
    train.train,
    train.eval,
    packed.predict,
    serve.serve,
    packed.bench,
    packed.export,
    packed.web,
    packed.push,
    packed.info,
    compare.compare,
    compare.complexity,
    train.ablate,
    analyze.analyze,
    train.demo,
    environment.report_env,
):
    app.command(help=help_text(command))(ends_in_a_sentence(command))


def empty_argument(arguments: Sequence[str]) -> str | None:
    """Return what the first empty argument is called, an unset variable of a script perhaps; an empty path is ``.``."""
    for number, argument in enumerate(arguments):
        before = arguments[number - 1] if number else ""
        if not argument:
            return before if re.fullmatch(r"--[\w-]+", before) else f"Argument {number + 1}"
        if re.fullmatch(r"--[\w-]+=", argument):
            return argument.removesuffix("=")
    return None


def main() -> None:
    """Run the command line; see :mod:`qvit.cli.ending` for how it ends."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack a character that a file name or a class has
            stream.reconfigure(errors="backslashreplace")
    if (empty := empty_argument(sys.argv[1:])) is not None:
        end(f"{empty} is empty: say what is meant, or leave it out.", REFUSED)
    try:
        with ended_by_sigterm():
            status = app(standalone_mode=False)
    except Terminated:
        end("Stopped by SIGTERM.", STOPPED)
    except _ClickException as error:  # its message repeats what was typed, or what the shell found for a *
        shown = io.StringIO()
        error.show(file=shown)
        print(*map(printable, shown.getvalue().splitlines()), sep="\n", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(status)
