"""Commands of the training wing: train, eval, ablate, demo."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvit.cli.ending import rank
from qvit.cli.options import (
    Accumulate,
    Changes,
    Compile,
    Cpu,
    Data,
    DataRoot,
    DecodeOnce,
    Fsdp,
    Model,
    Out,
    Override,
    Precision,
    RecipeName,
    SaveEvery,
    Seed,
    SkipCorrupt,
    Splits,
    Workers,
    check_bits,
    console,
    decoded,
    float_model,
    options_of,
    own_folder,
    parse_numbers,
    parse_overrides,
    recipe_of,
    say_skipped,
)
from qvit.errors import ConfigError
from qvit.files import printable

if TYPE_CHECKING:
    from qvit.train.methods import Result


def train(
    model: Model,
    data: Data,
    out: Out,
    full_precision: Annotated[bool, typer.Option("--full-precision", help="Train a float model: a teacher.")] = False,
    bits: Annotated[int | None, typer.Option(help="Bits of weights and activations, 2..8.")] = None,
    activation_bits: Annotated[int | None, typer.Option(help="Bits of activations, if others.")] = None,
    method: Annotated[
        str, typer.Option(help="q-vit, baseline, rectify (IRM), distill (DGD), reconstruct or ptq.")
    ] = "q-vit",
    rectifier: Annotated[str, typer.Option(help="IRM's statistics: head or token.")] = "head",
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Float model to distil from: a checkpoint, timm weights, the name of a pretrained timm model, or "
            "hf-hub:OWNER/NAME or a folder (timm's, or transformers' ViT, DeiT, Swin, BEiT, DINOv2, CLIP and SigLIP)."
        ),
    ] = None,
    initial_model: Annotated[
        str | None,
        typer.Option(
            help="Model to start from, given like --teacher, or a quantized checkpoint, whose scales count if bits "
            "and rectification are the same [default: the teacher]."
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

    Under torchrun, or accelerate launch on GPUs, the processes divide each batch of the recipe between them.

    The status is 0 for a finished run alone; 143 (128 and the number of SIGTERM, what a shell reports of a program that
    this signal ended) for one that SIGTERM stopped, which has saved itself; 130 after Ctrl-C; 2 where something is
    wrong, which one sentence says. After the first two --resume goes on.

    OUT/metrics.jsonl has a line per epoch. --set quantized.track_oscillation=true adds the percentage of weights that
    change code back and forth, for some passes over all weights at every step.

    Examples:
      qvit train vit_tiny_patch16_224 --full-precision --data digits --out runs/float
      qvit train vit_tiny_patch16_224 --bits 4 --teacher runs/float/best.pt --data digits --out runs/q4
      torchrun --nproc-per-node 8 -m qvit.cli train deit_small_patch16_224 --bits 4 --teacher t.pth --data imagenet ...
    """
    from qvit.train import methods

    options = options_of(
        out, seed, workers, precision, compile_models, skip_corrupt, resume, cpu, data, save_every, accumulate, fsdp
    )
    settings = recipe_of(recipe, data, change)
    if full_precision:
        names = ("--bits", "--activation-bits", "--teacher", "--initial-model", "--override")
        values = (bits, activation_bits, teacher, initial_model, override)
        given = [name for name, value in zip(names, values, strict=True) if value is not None]
        if given:
            raise ConfigError(f"--full-precision makes a float model: leave out {' and '.join(given)}.")
        settings.hyperparameters("full_precision")
        sets, spec = methods.open_images(model, settings, data, root=data_root, splits=splits)
        run = functools.partial(methods.train_full_precision, spec)
        title = "full precision"
    else:
        if bits is None:
            raise ConfigError("Give --bits 2..8, or --full-precision for a float model.")
        if method not in methods.METHODS:
            raise ConfigError(f"There is no method {method!r}: the methods are {', '.join(methods.METHODS)}.")
        if rectifier not in ("head", "token"):
            raise ConfigError(f"--rectifier must be head or token, not {rectifier!r}.")
        if teacher is None and initial_model is None:
            raise ConfigError(
                "Quantization starts from a float model: give --teacher CHECKPOINT (or --initial-model CHECKPOINT to "
                "train without a teacher); qvit train MODEL --full-precision makes one."
            )
        widths = check_bits(bits, activation_bits)
        overrides = parse_overrides(override)
        settings.hyperparameters("quantized")
        sets, spec = methods.open_images(model, settings, data, root=data_root, splits=splits)
        guide = None if teacher is None else float_model(teacher, spec, "teacher")
        initial = guide if initial_model is None else float_model(initial_model, spec, "initial model")
        assert initial is not None
        if (initial.spec.name, initial.spec.model_args) != (spec.name, spec.model_args):
            raise ConfigError(
                f"The student starts from {initial_model or teacher}, a {initial.spec.name} with "
                f"{initial.spec.model_args}, and is to be a {spec.name} with "
                f"{spec.model_args}: give a fitting --initial-model, or that model."
            )
        reading: Any = rectifier
        student = (initial, guide, method, widths, reading)
        methods.check_student(*student, overrides)  # what is refused is refused before images are decoded
        run = functools.partial(methods.train_quantized, *student, overrides=overrides)
        title = f"{bits} bits, {methods.METHODS[method].title}"
    with own_folder(options):
        if decode_once:
            sets = decoded(sets, spec, options)
        result = run(sets, settings, options, console())
    say_skipped(result.accuracy)
    if rank() == 0:
        console().print(printable(result_sentence(title, out, result)), soft_wrap=True)


def result_sentence(title: str, out: Path, result: Result) -> str:
    """Return what a run has come to, with the files and the checksums of their weights."""
    from qvit.models.checkpoint import load_checkpoint, weights_checksum
    from qvit.train.display import result_line

    last, accuracy = weights_checksum(result.model)[:16], result.accuracy
    if not result.history:
        top = f"top-1 {accuracy.top1:.2f}, top-5 {accuracy.top5:.2f}"
        files = f"{title}, {accuracy.images} validation images: {top}, in {out / 'best.pt'}"
        return f"{files}; SHA-256 of the weights {last}..."
    best = weights_checksum(load_checkpoint(out / "best.pt")[0])[:16]
    return f"{result_line(title, out, result.history)}; SHA-256 of the weights {best}... and {last}..."


def eval(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="What qvit train or qvit export wrote: .pt or .safetensors.")
    ],
    data: Data,
    data_root: DataRoot = None,
    splits: Splits = "train,validation",
    batch_size: Annotated[int, typer.Option(help="Images per step.", min=1)] = 64,
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

    from qvit.data.loader import make_loader, make_transform
    from qvit.data.sources import open_validation
    from qvit.models.packed_model import load_model
    from qvit.train.evaluate import evaluate
    from qvit.train.options import make_accelerator, rank_of

    options = options_of(Path(), 0, workers, "no", False, skip_corrupt, False, cpu, data)
    model, spec = load_model(checkpoint)
    if not spec.classes:
        raise ConfigError(f"{checkpoint} holds a feature extractor, which has no classes: there is no accuracy of it.")
    images = open_validation(data, spec.classes, mode=spec.mode, root=data_root, splits=splits)
    accelerator = make_accelerator(options)
    device = accelerator.device
    loader = make_loader(
        images,
        make_transform(spec.preprocessing),
        batch_size,
        shuffle=False,
        workers=options.workers,
        device=device,
        rank=rank_of(accelerator),
    )
    accuracy = evaluate(model.to(device), loader, device, skip_corrupt=skip_corrupt)
    table = Table(title=printable(f"{checkpoint} on {data}"))
    for column in ("model", "bits", "top-1", "top-5", "images", "images/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    config = spec.quant_config
    table.add_row(
        printable(spec.name),
        "32 (float)" if config is None else f"{config['weight_bits']}/{config['activation_bits']}",
        f"{accuracy.top1:.2f}",
        f"{accuracy.top5:.2f}",
        str(accuracy.images),
        f"{accuracy.images / max(accuracy.seconds, 1e-9):.0f}",
    )
    console().print(table)
    say_skipped(accuracy)


def ablate(
    model: Model,
    data: Data,
    teacher: Annotated[
        str, typer.Option(help="Float model, as of qvit train: teacher and initial model of every run.")
    ],
    out: Out,
    bits: Annotated[str, typer.Option(help="Comma-separated.")] = "4,3,2",
    seeds: Annotated[str, typer.Option(help="How many (3 is 0, 1 and 2), or which (comma-separated).")] = "3",
    rows: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: ptq, reconstruct, baseline, rectify-head, rectify-token, distill, q-vit-head, "
            "q-vit-token [default: all]; and what others do: authors, authors-rectify-token, authors-distill, "
            "authors-q-vit-token, statsq, token-scales, channel-scales, ofq, ofq-annealed."
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

    Finished cells are kept in OUT and not run again; a run that was cut off goes on from its last checkpoint. Several
    commands may fill one OUT. The status is that of qvit train: 0 only if nothing was cut off.

    Example:
      qvit ablate vit_tiny_patch16_224 --data digits --teacher runs/float/best.pt --bits 4,2 --seeds 3 --out runs/table
    """
    from qvit.study.ablation import ablate as run
    from qvit.study.ablation import report_of, results_table, rows_named, teacher_statistics
    from qvit.study.report import write_ablation_report
    from qvit.train.methods import open_images

    options = options_of(
        out, 0, workers, precision, compile_models, skip_corrupt, False, cpu, data, save_every, accumulate, fsdp
    )
    settings = recipe_of(recipe, data, change)
    settings.hyperparameters("quantized")
    widths, chosen = parse_numbers("--bits", bits), rows_named(rows)
    for width in widths:
        check_bits(width, None)
    numbers = parse_numbers("--seeds", seeds)
    if len(numbers) == 1 and "," not in seeds:
        numbers = list(range(numbers[0]))
    if not numbers or min(numbers) < 0:
        raise ConfigError(f"--seeds must be at least 1, or a list of seeds from 0 up, not {seeds!r}.")
    sets, spec = open_images(model, settings, data, root=data_root, splits=splits)
    guide = float_model(teacher, spec, "teacher")
    if (guide.spec.name, guide.spec.model_args) != (spec.name, spec.model_args):
        raise ConfigError(
            f"{teacher} holds a {guide.spec.name} with {guide.spec.model_args}, not a {spec.name} with "
            f"{spec.model_args}: the ablation starts every run from it."
        )
    if decode_once:
        sets = decoded(sets, spec, options)
    records = run(
        guide,
        sets,
        settings,
        options,
        console(),
        bits=widths,
        seeds=numbers,
        rows=chosen,
        ladder=ladder,
        overrides=parse_overrides(override),
    )
    top1 = guide.spec.metrics.get("val_top1")
    console().print(results_table(records, top1))
    report = report_of(out)
    if rank() == 0 and records:
        write_ablation_report(report, records, top1, teacher_statistics(guide, sets, options))
    console().print(printable(f"Report in {report}, records in {out}/*-bit/*/seed-*/result.json"), soft_wrap=True)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report and the checkpoints.")] = Path("demo"),
) -> None:
    """Train a small ViT on handwritten digits, quantize it to 4 and 2 bits, run it in the engine; report.html tells.

    Example:
      qvit demo --out demo
    """
    from qvit.study.demo import run_demo

    run_demo(out, console())
