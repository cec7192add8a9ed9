"""Options that commands share, and what they mean."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvit.cli.ending import rank
from qvit.errors import ConfigError, QvitError
from qvit.files import check_absent, first_line, printable, shown

if TYPE_CHECKING:
    from rich.console import Console

    from qvit.data.sources import ImageSets
    from qvit.models.spec import ModelSpec
    from qvit.train.evaluate import Accuracy
    from qvit.train.methods import FloatModel
    from qvit.train.options import Options
    from qvit.train.recipe import Recipe
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="timm's name of a vision transformer (vit_*, deit_*, swin_*, beit_*, eva*, ...)."
    ),
]
Packed = Annotated[Path, typer.Argument(metavar="MODEL", help="What qvit export wrote: a .safetensors file.")]
Data = Annotated[
    str,
    typer.Option(
        help="digits; a folder with train/ and val/ of class folders or WebDataset shards; a folder of either (a tenth "
        "is held out); wds/FOLDER with the shards of both splits; or a timm data set: torch/NAME, hfds/NAME."
    ),
]
FloatSource = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Float model: a timm name with pretrained weights, a checkpoint, hf-hub:OWNER/NAME, or a folder of "
        "timm's or transformers'.",
    ),
]
WeightsName = Annotated[str | None, typer.Option(help="timm's name, if MODEL is a file of weights alone.")]
Pictures = Annotated[str, typer.Option(help="Folder of pictures, at any depth; no labels needed.")]
ReportFolder = Annotated[Path | None, typer.Option(help="Folder for report.html and report.json.")]
DataRoot = Annotated[str | None, typer.Option(help="Folder of a timm data set.")]
Splits = Annotated[
    str,
    typer.Option(
        help="Training and validation split of a timm data set, folders in --data, or parts of shards' names."
    ),
]
Override = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=BITS",
        help="Bits of modules by name: 'blocks.0.*=8' or '*.fc2=2/4'; @FILE for all lines of a file; repeatable.",
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="YAML file or built-in recipe: cifar10, cifar10_small, deit_imagenet, digits [default: by --data].",
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change a recipe entry, e.g. quantized.epochs=5; repeatable."),
]
Out = Annotated[Path, typer.Option(help="Folder for checkpoints, metrics and TensorBoard.")]
Seed = Annotated[int, typer.Option(help="Same seed, same result (on one machine).", min=0)]
Workers = Annotated[int | None, typer.Option(help="Processes that decode images [default: by machine].", min=0)]
Precision = Annotated[str, typer.Option(help="no (float32) or bf16 (autocast).")]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile the models: slower to start, faster to run.")]
SkipCorrupt = Annotated[bool, typer.Option("--skip-corrupt", help="Go on without unreadable images, and count them.")]
DecodeOnce = Annotated[
    bool,
    typer.Option("--decode-once", help="Decode all images once, keep them on the device as bytes, augment there."),
]
Cpu = Annotated[bool, typer.Option("--cpu", help="Do not use a GPU.")]
SaveEvery = Annotated[str, typer.Option(help="How often to save inside an epoch: 10m, 30s, or 500 (steps).")]
Accumulate = Annotated[int, typer.Option(help="Parts in which a batch is computed, to save memory.", min=1)]
Fsdp = Annotated[bool, typer.Option("--fsdp", help="Under torchrun, shard the training state (FSDP2), not copy it.")]


@functools.cache
def console() -> Console:
    """Return where the commands print: texts are texts, without markup, emoji or colours of their own.

    rich is imported here, for ``qvit predict`` is to start quickly.
    """
    from rich.console import Console

    return Console(quiet=rank() > 0, markup=False, emoji=False, highlight=False)


def recipe_of(name: str | None, data: str, changes: list[str] | None) -> Recipe:
    """Return the recipe called ``name``, or the one that fits ``data``, with its entries changed."""
    from qvit.train.recipe import builtin_recipes, load_recipe

    guess = data.rsplit("/", 1)[-1]
    default = guess if guess in builtin_recipes() else "deit_imagenet"
    return load_recipe(name or default, changes or ())


def float_model(source: str, spec: ModelSpec, role: str) -> FloatModel:
    """Return a float model with its spec, whose classes are the data's.

    Args:
        source: a file, a folder, a timm model or one on the Hub.
        spec: what the model must be.
        role: ``"teacher"`` or ``"initial model"``, which may be quantized too.
    """
    from qvit.data.sources import check_classes
    from qvit.errors import TeacherMismatchError
    from qvit.models.float_models import load_float
    from qvit.train.methods import FloatModel

    model, found = load_float(
        source,
        spec,
        lambda sentence: console().print(printable(sentence), soft_wrap=True),
        quantized=role == "initial model",
    )
    try:
        check_classes(f"the {role} {source}", found.classes, "the data", spec.classes)
    except QvitError as error:
        raise TeacherMismatchError(str(error)) from error
    return FloatModel(model, found)


def options_of(
    out: Path,
    seed: int,
    workers: int | None,
    precision: str,
    compile_models: bool,
    skip_corrupt: bool,
    resume: bool,
    cpu: bool,
    data: str,
    save_every: str = "10m",
    accumulate: int = 1,
    fsdp: bool = False,
) -> Options:
    """Return how a run is carried out, from a command's options."""
    import torch

    from qvit.train.options import Options
    from qvit.train.run import SaveEvery

    if precision not in ("no", "bf16"):
        raise ConfigError(f"--precision must be no or bf16, not {precision!r}.")
    if workers is None:
        # Decoding beside training pays where a GPU trains; on the CPU the cores are the model's.
        workers = min(8, torch.get_num_threads()) if torch.cuda.is_available() and data != "digits" else 0
    interval = SaveEvery.parse(save_every)
    return Options(out, seed, workers, precision, compile_models, skip_corrupt, resume, cpu, accumulate, fsdp, interval)


def decoded(sets: ImageSets, spec: ModelSpec, options: Options) -> ImageSets:
    """Return ``sets`` with every image decoded and kept on the device as bytes."""
    from qvit.data.resident import decode_once

    return decode_once(sets, spec.preprocessing, console(), workers=options.workers, skip_corrupt=options.skip_corrupt)


def say_skipped(accuracy: Accuracy) -> None:
    """Print how many images could not be read, if any."""
    if accuracy.unreadable:
        console().print(f"Unreadable images skipped: {accuracy.unreadable}.")


def check_out(options: Options) -> None:
    """Refuse to overwrite a run, or to resume none."""
    from qvit.train.run import METRICS, can_go_on

    exists = can_go_on(options.out)
    if options.resume and not exists:
        raise ConfigError(f"There is no {options.out / 'last.pt'} to resume: leave out --resume to start.")
    if exists and not options.resume:
        raise ConfigError(f"{options.out} holds a run already: give --resume to go on with it, or another --out.")
    if not options.resume:  # best.pt alone is of post-training quantization, which has nothing to go on with
        for name in ("best.pt", METRICS):
            check_absent(options.out / name)


@contextmanager
def own_folder(options: Options) -> Iterator[None]:
    """Keep a run's folder from being overwritten: by this command, and by others until the block ends."""
    from qvit.train.lock import alone_in
    from qvit.train.options import make_accelerator

    check_out(options)  # before the folder is made
    with alone_in(options.out, make_accelerator(options)):
        check_out(options)  # another command may have filled it since
        yield


def check_bits(bits: int, activation_bits: int | None) -> tuple[int, int]:
    """Return the bits of weights and of activations, checked."""
    from qvit.config import QuantConfig

    config = QuantConfig(bits, bits if activation_bits is None else activation_bits)
    return config.weight_bits, config.activation_bits


def parse_overrides(items: list[str] | None) -> dict[str, int | tuple[int, int]]:
    """Return what ``--override PATTERN=BITS`` means, bits by pattern; ``@FILE`` stands for the lines of a file."""
    overrides: dict[str, int | tuple[int, int]] = {}
    for item in items or ():
        for line in _lines(item.removeprefix("@")) if item.startswith("@") else [item]:
            pattern, _, value = line.rpartition("=")
            widths = value.split("/")
            if not pattern or len(widths) > 2 or not all(width.isdecimal() and len(width) < 10 for width in widths):
                raise ConfigError(
                    "--override takes PATTERN=BITS, PATTERN=WEIGHT/ACTIVATION or @FILE with lines of these, not "
                    f"{shown(line)}."
                )
            overrides.pop(pattern, None)  # the last one wins, over patterns between the two also
            overrides[pattern] = int(widths[0]) if len(widths) == 1 else (int(widths[0]), int(widths[1]))
    return overrides


def _lines(path: str) -> list[str]:
    """Return the lines of a text file without those that are empty or begin with ``#``."""
    try:
        lines = map(str.strip, Path(path).read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--override @{path} is no text file that can be read: {first_line(error)}") from error
    meant = [line for line in lines if line and not line.startswith("#")]
    if not meant:
        raise ConfigError(
            f"--override @{path} holds no line PATTERN=BITS: leave it out, or give the file that was meant."
        )
    return meant


def parse_numbers(option: str, text: str) -> list[int]:
    """Return the whole numbers of an option such as ``4,3,2``."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise ConfigError(f"{option} takes whole numbers separated by commas, not {text!r}.")
    return numbers
