"""What happens inside models: distributions, attention, noise, and which part costs most."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qvit.cli.options import (
    Changes,
    Cpu,
    DataRoot,
    Seed,
    SkipCorrupt,
    Splits,
    Workers,
    check_bits,
    console,
    float_model,
    options_of,
    parse_numbers,
)
from qvit.errors import ConfigError
from qvit.files import printable


def analyze(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT...", help="Checkpoints of one architecture, float and quantized: .pt files."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html, analysis.json and figures/.")],
    data: Annotated[str | None, typer.Option(help="Data set with the models' classes, as of qvit train.")] = None,
    images: Annotated[
        str | None, typer.Option(help="Instead of --data: a folder of pictures, at any depth; no labels needed.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Float model to compare with, as of qvit train [default: the first float CHECKPOINT]."),
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(help="Attention layers to draw, comma-separated: 0,3,6 [default: four of them].")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Images to look at, evenly spaced [default: all].", min=1)] = None,
    study_images: Annotated[
        int, typer.Option(help="Images of the bottleneck study, some 16 runs each; 0 to leave it out.", min=0)
    ] = 1000,
    bits: Annotated[
        int | None,
        typer.Option(help="Of the bottleneck study [default: the fewest of the checkpoints, or 4]."),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="Train every part of the bottleneck study too, with this recipe."),
    ] = None,
    change: Changes = None,
    data_root: DataRoot = None,
    splits: Splits = "train,validation",
    seed: Seed = 0,
    workers: Workers = None,
    skip_corrupt: SkipCorrupt = False,
    cpu: Cpu = False,
) -> None:
    """Look into models side by side on the same images: a report with what the paper shows, and where they break.

    Queries and keys with their entropy, attention maps and how far they reach, the noise of every quantizer with the
    worst by name and what to try, and the bottleneck study: which part of the float model its few bits cost most.
    Images are the validation images of --data, with labels, or a fifth of the pictures in --images, without; the study
    is calibrated on others.

    Examples:
      qvit analyze runs/float/best.pt runs/q4/best.pt runs/q2/best.pt --data digits --out analysis
      qvit analyze model.pt --teacher deit_small_patch16_224 --images photos --blocks 0,3,6 --out analysis
    """
    import dataclasses

    from qvit.study.analysis import Request, run_analysis, summary
    from qvit.study.subjects import labelled_images, open_subjects, pictures_of, teacher_for
    from qvit.train.recipe import load_recipe

    if (data is None) == (images is None):
        raise ConfigError("Give either --data, whose validation images have labels, or --images, a folder of pictures.")
    source = images if data is None else data
    assert source is not None
    options = options_of(out, seed, workers, "no", False, skip_corrupt, False, cpu, source)
    if train is not None and data is None:
        raise ConfigError("--train needs labels: give --data instead of --images.")
    if change and train is None:
        raise ConfigError("--set changes the recipe of --train: give that too.")
    if train is not None and not study_images:
        raise ConfigError("--train is of the bottleneck study: leave out --study-images 0.")
    recipe = None if train is None else load_recipe(train, change or ())
    if recipe is not None:
        recipe.hyperparameters("quantized")
    chosen = None if blocks is None else parse_numbers("--blocks", blocks)
    subjects = open_subjects(checkpoints)
    spec = subjects[0].spec
    reference = next((subject.name for subject in subjects if subject.spec.quant_config is None), None)
    if teacher is not None:
        found = float_model(teacher, dataclasses.replace(spec, quant_config=None), "teacher")
        subjects.append(teacher_for(subjects, found, teacher))
        reference = subjects[-1].name
    if train is not None and reference is None:
        raise ConfigError("--train starts from a float model: give one among the checkpoints, or --teacher.")
    if data is None:
        material, remark = pictures_of(source, spec, seed)
        if remark:
            console().print(printable(remark), soft_wrap=True)
    else:
        material = labelled_images(data, spec, root=data_root, splits=splits)
    fewest = min(
        (subject.spec.quant_config["weight_bits"] for subject in subjects if subject.spec.quant_config), default=4
    )
    request = Request(
        subjects,
        reference,
        source,
        material,
        chosen,
        limit,
        study_images,
        check_bits(fewest if bits is None else bits, None)[0],
        recipe,
    )
    result = run_analysis(request, options, console())
    for part in summary(result, out):
        console().print(part, soft_wrap=isinstance(part, str))
