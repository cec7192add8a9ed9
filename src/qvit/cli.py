"""The ``qvit`` command: each subcommand a few lines that call the library."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvit.errors import ConfigError, CorruptImageError, QvitError, TrainingStopped

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from qvit.train.checkpoint import ModelCard
    from qvit.train.data import ImageSets
    from qvit.train.loop import Accuracy, Options
    from qvit.train.methods import FloatModel
    from qvit.train.recipe import Recipe

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
    help="Vision transformers at 4, 3 and 2 bits: train them with Q-ViT, fully quantized, and measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="timm's name of a vision transformer (vit_*, deit_*).")]
Packed = Annotated[Path, typer.Argument(metavar="MODEL", help="What qvit export wrote: a .safetensors file.")]
Data = Annotated[
    str,
    typer.Option(
        help="digits; a folder with train/ and val/ of class folders or WebDataset shards; a folder of either (a tenth "
        "is held out); wds/FOLDER with the shards of both splits; or a timm data set: torch/NAME, hfds/NAME."
    ),
]
DataRoot = Annotated[str | None, typer.Option(help="Folder of a timm data set.")]
Splits = Annotated[
    str, typer.Option(help="Training and validation split of a timm data set, or parts of the shards' names.")
]
Override = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN=BITS", help="Bits of modules by name: 'blocks.0.*=8' or '*.fc2=2/4'; repeatable."),
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
    """Return where the commands print; rich is imported here, for ``qvit predict`` is to start quickly."""
    from rich.console import Console

    return Console(quiet=_rank() > 0)


@app.command()
def train(
    model: Model,
    data: Data,
    out: Out,
    full_precision: Annotated[bool, typer.Option("--full-precision", help="Train a float model: a teacher.")] = False,
    bits: Annotated[int | None, typer.Option(help="Bits of weights and activations, 2..8.")] = None,
    activation_bits: Annotated[int | None, typer.Option(help="Bits of activations, if others.")] = None,
    method: Annotated[str, typer.Option(help="q-vit, baseline, rectify (IRM), distill (DGD) or ptq.")] = "q-vit",
    rectify: Annotated[str, typer.Option(help="IRM's statistics: head or token.")] = "head",
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Float model to distil from: a checkpoint, timm weights, hf-hub:OWNER/NAME (timm, or transformers' "
            "ViT and DeiT), or the name of a pretrained timm model."
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Model to start from, given like --teacher, or a checkpoint of other bits [default: the teacher]."
        ),
    ] = None,
    override: Override = None,
    recipe: RecipeName = None,
    change: Changes = None,
    data_root: DataRoot = None,
    splits: Splits = "train,validation",
    seed: Seed = 0,
    workers: Workers = None,
    precision: Precision = "no",
    compile_models: Compile = False,
    skip_corrupt: SkipCorrupt = False,
    decode_once: DecodeOnce = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT/last.pt.")] = False,
    save_every: SaveEvery = "10m",
    accumulate: Accumulate = 1,
    fsdp: Fsdp = False,
    cpu: Cpu = False,
) -> None:
    """Train a float model, or quantize one and train that.

    Under torchrun or accelerate launch the processes divide each batch of the recipe between them.

    Examples:
      qvit train vit_tiny_patch16_224 --full-precision --data digits --out runs/float
      qvit train vit_tiny_patch16_224 --bits 4 --teacher runs/float/best.pt --data digits --out runs/q4
      torchrun --nproc-per-node 8 -m qvit.cli train deit_small_patch16_224 --bits 4 --teacher t.pth --data imagenet ...
    """
    from qvit.train import methods
    from qvit.train.checkpoint import weights_checksum

    options = _options(
        out, seed, workers, precision, compile_models, skip_corrupt, resume, cpu, data, save_every, accumulate, fsdp
    )
    settings = _recipe(recipe, data, change)
    if full_precision:
        if bits is not None or teacher is not None or start is not None:
            raise ConfigError("--full-precision makes a float model: leave out --bits, --teacher and --start.")
        sets, card = methods.open_images(model, settings, data, root=data_root, splits=splits)
        _fresh(options)
        if decode_once:
            sets = _decoded(sets, card, options)
        result = methods.train_full_precision(card, sets, settings, options, console())
        title = "full precision"
    else:
        if bits is None:
            raise ConfigError("Give --bits 2..8, or --full-precision for a float model.")
        if method not in methods.METHODS:
            raise ConfigError(f"There is no method {method!r}: the methods are {', '.join(methods.METHODS)}.")
        if rectify not in ("head", "token"):
            raise ConfigError(f"--rectify must be head or token, not {rectify!r}.")
        if teacher is None and start is None:
            raise ConfigError(
                "Quantization starts from a float model: give --teacher CHECKPOINT (or --start CHECKPOINT to train "
                "without a teacher); qvit train MODEL --full-precision makes one."
            )
        widths = _check_bits(bits, activation_bits)
        overrides = _overrides(override)
        sets, card = methods.open_images(model, settings, data, root=data_root, splits=splits)
        guide = None if teacher is None else _float_model(teacher, card, "teacher")
        first = guide if start is None else _float_model(start, card, "start")
        assert first is not None
        if (first.card.name, first.card.model_args) != (card.name, card.model_args):
            raise ConfigError(
                f"The student starts from {start or teacher}, a {first.card.name} with {first.card.model_args}, and is "
                f"to be a {card.name} with {card.model_args}: give a fitting --start, or that model."
            )
        _fresh(options)
        if decode_once:
            sets = _decoded(sets, card, options)
        reading: Any = rectify
        result = methods.train_quantized(
            first, guide, method, widths, reading, sets, settings, options, console(), overrides
        )
        title = f"{bits} bits, {methods.METHODS[method].title}"
    accuracy = result.accuracy
    console().print(
        f"{title}: top-1 {accuracy.top1:.2f}, top-5 {accuracy.top5:.2f} on {accuracy.images} images; "
        f"checkpoints in {out}; SHA-256 of the weights {weights_checksum(result.model)[:16]}...",
        highlight=False,
        soft_wrap=True,
    )
    _say_skipped(accuracy)


@app.command()
def eval(
    checkpoint: Annotated[Path, typer.Argument(help="What qvit train or qvit export wrote: .pt or .safetensors.")],
    data: Data,
    data_root: DataRoot = None,
    splits: Splits = "train,validation",
    batch_size: Annotated[int, typer.Option(help="Images a step.", min=1)] = 64,
    workers: Workers = None,
    skip_corrupt: SkipCorrupt = False,
    cpu: Cpu = False,
) -> None:
    """Measure top-1 and top-5 of a checkpoint, or of a packed model in the engine, on the validation images.

    Of a folder: val/ (or validation/, test/) inside it if there is one, else all of its images.

    Examples:
      qvit eval runs/q4/best.pt --data digits
      qvit eval model.safetensors --data digits
    """
    from rich.table import Table

    from qvit.train.checkpoint import load_checkpoint
    from qvit.train.data import make_loader, make_transform, open_validation
    from qvit.train.loop import evaluate, make_accelerator, share_of
    from qvit.train.packed_model import load_packed

    options = _options(Path(), 0, workers, "no", False, skip_corrupt, False, cpu, data)
    model: nn.Module
    model, card = load_packed(checkpoint) if checkpoint.suffix == ".safetensors" else load_checkpoint(checkpoint)
    images = open_validation(data, card.classes, mode=card.mode, root=data_root, splits=splits)
    accelerator = make_accelerator(options)
    device = accelerator.device
    loader = make_loader(
        images,
        make_transform(card.preprocessing),
        batch_size,
        shuffle=False,
        workers=options.workers,
        device=device,
        share=share_of(accelerator),
    )
    accuracy = evaluate(model.to(device), loader, device, skip_corrupt=skip_corrupt)
    table = Table(title=f"{checkpoint} on {data}")
    for column in ("model", "bits", "top-1", "top-5", "images", "images/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    config = card.quant_config
    table.add_row(
        card.name,
        "32 (float)" if config is None else f"{config['weight_bits']}/{config['activation_bits']}",
        f"{accuracy.top1:.2f}",
        f"{accuracy.top5:.2f}",
        str(accuracy.images),
        f"{accuracy.images / max(accuracy.seconds, 1e-9):.0f}",
    )
    console().print(table)
    _say_skipped(accuracy)


@app.command()
def predict(
    model: Packed,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    top_k: Annotated[int, typer.Option(help="Classes an image.", min=1)] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads [default: all processors].", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Classify images with a packed model. Needs no PyTorch.

    Images that cannot be read are named, the others are classified all the same, and the status is then 2.

    Example:
      qvit predict model.safetensors cat.jpg dog.png --top-k 3
    """
    import json

    from qvit.runtime.engine import load

    engine = load(model, threads=threads)
    results: list[dict[str, Any]] = []
    for image in images:
        try:
            best = engine.predict(image, top_k)[0]
        except CorruptImageError as error:
            sys.stdout.flush()
            print(f"qvit: {error}", file=sys.stderr)
            results.append({"image": str(image), "error": str(error)})
            continue
        results.append({"image": str(image), "classes": [{"name": n, "probability": p} for n, p in best]})
        if not as_json:  # plain text: the import of rich takes as long as the model does
            print(image, *(f"  {probability:7.2%}  {name}" for name, probability in best), sep="\n")
    if as_json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    if any("error" in result for result in results):
        raise typer.Exit(2)


@app.command()
def bench(
    model: Packed,
    batch: Annotated[str, typer.Option(help="Images an inference, comma-separated.")] = "1,8",
    threads: Annotated[str | None, typer.Option(help="Comma-separated [default: all processors].")] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="What to compare with, comma-separated, or none: torch, torch-compile, onnxruntime, "
            "onnxruntime-dynamic, onnxruntime-static, openvino, openvino-int8 [default: all that are installed]."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Times each runtime is timed; the median counts.", min=1)] = 20,
    figure: Annotated[Path | None, typer.Option(help="Write a bar chart there (PNG).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure there (JSON).")] = None,
) -> None:
    """Time a packed model beside PyTorch, ONNX Runtime and OpenVINO, whichever are installed, in one run.

    They run the float model of the same architecture, and int8 versions of it, with random weights.

    Example:
      qvit bench model.safetensors --batch 1,8 --threads 2 --figure speed.png --json speed.json
    """
    import json

    from qvit.bench import compare
    from qvit.files import write_atomically, write_text
    from qvit.peers import PEERS
    from qvit.runtime.engine import processors

    if figure is not None:
        from qvit.analysis.figures import latency_bars, png
    chosen = list(PEERS) if peers is None else [name for name in peers.split(",") if name and name != "none"]
    comparison = compare(
        {f"qvit, {model.name}": model},
        _numbers("--batch", batch),
        [processors()] if threads is None else _numbers("--threads", threads),
        peers=chosen,
        rounds=rounds,
        report=lambda message: console().print(message, style="dim", highlight=False),
    )
    console().print(comparison.table(f"{model}, {comparison.machine['cpu']}"))
    for line in comparison.notes():
        console().print(line, highlight=False)
    if figure is not None:
        data = png(latency_bars(comparison.panels(), comparison.packed))
        write_atomically(figure, lambda temporary: temporary.write_bytes(data))
    if json_file is not None:
        write_text(json_file, json.dumps(comparison.to_dict(), indent=1))


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="What qvit train wrote: best.pt or last.pt of a quantized model.")],
    out: Annotated[Path, typer.Argument(metavar="MODEL", help="File to write, e.g. model.safetensors.")],
) -> None:
    """Write a quantized checkpoint as one small file, which runs without PyTorch.

    Example:
      qvit export runs/q4/best.pt model.safetensors
    """
    from qvit.exporting import export_checkpoint

    export_checkpoint(checkpoint, out)
    size = out.stat().st_size / 1e6
    console().print(f"{out}: {size:.2f} MB; qvit info {out} says what is in it.", highlight=False, soft_wrap=True)


@app.command()
def push(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint (.pt) or a packed model (.safetensors).")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the Hugging Face Hub; made if absent.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private.")] = False,
) -> None:
    """Upload a checkpoint or a packed model to the Hugging Face Hub, with a model card.

    Log in first: hf auth login, or the variable HF_TOKEN.

    Example:
      qvit push model.safetensors me/deit-tiny-4-bit
    """
    from qvit.hub import push_to_hub

    console().print(push_to_hub(file, repository, private=private), highlight=False, soft_wrap=True)


@app.command()
def info(model: Packed) -> None:
    """Print what a packed model is: architecture, bits, size by part, preprocessing. Needs no PyTorch.

    Example:
      qvit info model.safetensors
    """
    from qvit.info import info_tables

    for table in info_tables(model):
        console().print(table)


@app.command()
def ablate(
    model: Model,
    data: Data,
    teacher: Annotated[str, typer.Option(help="Float model, as of qvit train: teacher and start of every run.")],
    out: Out,
    bits: Annotated[str, typer.Option(help="Comma-separated.")] = "4,3,2",
    seeds: Annotated[str, typer.Option(help="How many (3 is 0, 1 and 2), or which (comma-separated).")] = "3",
    rows: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: ptq, baseline, rectify-head, rectify-token, distill, q-vit-head, q-vit-token "
            "[default: all]."
        ),
    ] = None,
    override: Override = None,
    ladder: Annotated[
        bool, typer.Option("--ladder", help="Start each of --bits from the finished run of the bits before it.")
    ] = False,
    recipe: RecipeName = None,
    change: Changes = None,
    data_root: DataRoot = None,
    splits: Splits = "train,validation",
    workers: Workers = None,
    precision: Precision = "no",
    compile_models: Compile = False,
    skip_corrupt: SkipCorrupt = False,
    decode_once: DecodeOnce = False,
    save_every: SaveEvery = "10m",
    accumulate: Accumulate = 1,
    fsdp: Fsdp = False,
    cpu: Cpu = False,
) -> None:
    """Run the paper's ablation: each method at each number of bits, mean and spread over seeds.

    Finished cells are kept in OUT and not run again; a run that was cut off goes on from its last checkpoint.

    Example:
      qvit ablate vit_tiny_patch16_224 --data digits --teacher runs/float/best.pt --bits 4,2 --seeds 3 --out runs/table
    """
    from qvit.train.ablation import ablate as run
    from qvit.train.ablation import results_table, rows_named, teacher_statistics
    from qvit.train.ablation_report import write_ablation_report
    from qvit.train.methods import open_images

    options = _options(
        out, 0, workers, precision, compile_models, skip_corrupt, False, cpu, data, save_every, accumulate, fsdp
    )
    settings = _recipe(recipe, data, change)
    widths, chosen = _numbers("--bits", bits), rows_named(rows)
    for width in widths:
        _check_bits(width, None)
    numbers = _numbers("--seeds", seeds)
    which = list(range(numbers[0])) if len(numbers) == 1 and "," not in seeds else numbers
    if not which or min(which) < 0:
        raise ConfigError(f"--seeds must be at least 1, or a list of seeds from 0 up, not {seeds!r}.")
    sets, card = open_images(model, settings, data, root=data_root, splits=splits)
    guide = _float_model(teacher, card, "teacher")
    if (guide.card.name, guide.card.model_args) != (card.name, card.model_args):
        raise ConfigError(
            f"{teacher} holds a {guide.card.name} with {guide.card.model_args}, not a {card.name} with "
            f"{card.model_args}: the ablation starts every run from it."
        )
    if decode_once:
        sets = _decoded(sets, card, options)
    records = run(
        guide,
        sets,
        settings,
        options,
        console(),
        bits=widths,
        seeds=which,
        rows=chosen,
        ladder=ladder,
        overrides=_overrides(override),
    )
    top1 = guide.card.metrics.get("val_top1")
    console().print(results_table(records, top1))
    report = out / "report.html"
    if _rank() == 0 and records:
        write_ablation_report(report, records, top1, teacher_statistics(guide, sets, options))
    console().print(f"Report in {report}, records in {out}/*-bit/*/seed-*/result.json", highlight=False, soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report and the checkpoints.")] = Path("demo"),
) -> None:
    """Train a small ViT on handwritten digits, quantize it to 4 and 2 bits, run it in the engine; report.html tells.

    Example:
      qvit demo --out demo
    """
    from qvit.demo import run_demo

    run_demo(out, console())


def _recipe(name: str | None, data: str, changes: list[str] | None) -> Recipe:
    from qvit.train.recipe import builtin_recipes, load_recipe

    guess = data.rsplit("/", 1)[-1]
    default = guess if guess in builtin_recipes() else "deit_imagenet"
    return load_recipe(name or default, changes or ())


def _float_model(source: str, card: ModelCard, role: str) -> FloatModel:
    from qvit.errors import TeacherMismatchError
    from qvit.train.data import check_classes
    from qvit.train.float_models import load_float
    from qvit.train.methods import FloatModel

    model, its = load_float(source, card, quantized=role == "start")
    try:
        check_classes(f"the {role} {source}", its.classes, "the data", card.classes)
    except QvitError as error:
        raise TeacherMismatchError(str(error)) from error
    return FloatModel(model, its)


def _options(
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
    import torch

    from qvit.train.loop import Options
    from qvit.train.run import SaveEvery

    if precision not in ("no", "bf16"):
        raise ConfigError(f"--precision must be no or bf16, not {precision!r}.")
    if workers is None:
        # Decoding beside training pays where a GPU trains; on the CPU the cores are the model's.
        workers = min(8, torch.get_num_threads()) if torch.cuda.is_available() and data != "digits" else 0
    interval = SaveEvery.parse(save_every)
    return Options(out, seed, workers, precision, compile_models, skip_corrupt, resume, cpu, accumulate, fsdp, interval)


def _decoded(sets: ImageSets, card: ModelCard, options: Options) -> ImageSets:
    from qvit.train.resident import decode_once

    return decode_once(sets, card.preprocessing, console(), workers=options.workers, skip_corrupt=options.skip_corrupt)


def _say_skipped(accuracy: Accuracy) -> None:
    if accuracy.unreadable:
        console().print(f"Unreadable images skipped: {accuracy.unreadable}.", highlight=False)


def _fresh(options: Options) -> None:
    """Refuse to overwrite a run, or to resume none."""
    from qvit.train.run import can_go_on

    exists = can_go_on(options.out)
    if options.resume and not exists:
        raise ConfigError(f"There is no {options.out / 'last.pt'} to resume: leave out --resume to start.")
    if exists and not options.resume:
        raise ConfigError(f"{options.out} holds a run already: give --resume to go on with it, or another --out.")


def _check_bits(bits: int, activation_bits: int | None) -> tuple[int, int]:
    from qvit.config import QuantConfig

    config = QuantConfig(bits, bits if activation_bits is None else activation_bits)
    return config.weight_bits, config.activation_bits


def _overrides(items: list[str] | None) -> dict[str, int | tuple[int, int]]:
    overrides: dict[str, int | tuple[int, int]] = {}
    for item in items or ():
        pattern, _, value = item.rpartition("=")
        widths = value.split("/")
        if not pattern or len(widths) > 2 or not all(width.isdecimal() for width in widths):
            raise ConfigError(f"--override takes PATTERN=BITS or PATTERN=WEIGHT/ACTIVATION, not {item!r}.")
        overrides[pattern] = int(widths[0]) if len(widths) == 1 else (int(widths[0]), int(widths[1]))
    return overrides


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise ConfigError(f"{option} takes whole numbers separated by commas, not {text!r}.")
    return numbers


def _rank() -> int:
    """Return which process this is under torchrun or accelerate launch; the others stay silent."""
    return int(os.environ.get("RANK", "0"))


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
        if _rank() > 0:
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


if __name__ == "__main__":
    main()
