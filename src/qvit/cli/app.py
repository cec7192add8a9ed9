"""The ``qvit`` command: each subcommand a few lines that call the library."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from qvit._version import __version__
from qvit.cli import packed, train
from qvit.cli.options import console, rank
from qvit.errors import CorruptImageError, QvitError, TrainingStopped

TRAINING_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "sklearn",
    "matplotlib",
    "tensorboard",
    "yaml",
    "jinja2",
    "huggingface_hub",
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    """Print the version and end, if it is ``wanted``."""
    if wanted:
        print(f"qvit {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Vision transformers at 4, 3 and 2 bits: train them with Q-ViT, fully quantized, and measure them."""


for command in (
    train.train,
    train.eval,
    packed.predict,
    packed.bench,
    packed.export,
    packed.push,
    packed.info,
    train.ablate,
    train.demo,
):
    app.command()(command)


def main() -> None:
    """Run the command line; a user's mistake ends as one sentence and status 2."""
    try:
        app()
    except TrainingStopped as stopped:
        console().print(str(stopped), highlight=False, soft_wrap=True)
    except CorruptImageError as error:  # of this process's share: the first one does not know of it
        sys.stdout.flush()
        print(f"qvit: {error}", file=sys.stderr)
        sys.exit(2)
    except QvitError as error:
        if rank() > 0:
            sys.exit(2)
        sys.stdout.flush()
        print(f"qvit: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] not in TRAINING_PACKAGES:
            raise
        print(f"qvit: This command needs {missing.name}: pip install 'qvit[train]' brings it.", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"qvit: {error.strerror or error}: {error.filename or 'the output'}.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("qvit: interrupted.", file=sys.stderr)
        sys.exit(130)
