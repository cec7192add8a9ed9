"""What is quantized without labels: a float model from anywhere, and pictures, decoded with a bar."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar
from torch import Tensor

from qvit.data.datasets import Images
from qvit.data.loader import make_loader, make_transform, readable
from qvit.errors import ConfigError
from qvit.files import printable
from qvit.models.float_models import load_float
from qvit.models.spec import ModelSpec, check_class_name
from qvit.train.options import Options

BATCH = 32
"""Pictures of a batch."""


def float_model(source: str, name: str | None, console: Console) -> tuple[Any, ModelSpec]:
    """Return the float model that is to be quantized, and its spec.

    Args:
        source: what :func:`qvit.models.float_models.load_float` takes.
        name: timm's, for a source that is a file of weights alone.
        console: is told what was decided on the way.

    Raises:
        ConfigError: if a name is given for another kind of source.
        QvitError: as :func:`qvit.models.float_models.load_float`.
    """
    if name is not None and not Path(source).is_file():
        raise ConfigError(f"--model names the model of a file of weights, which {source} is not: leave it out.")
    model, spec = load_float(
        source,
        None,
        lambda sentence: console.print(printable(sentence), soft_wrap=True),
        model_name=name,
    )
    for label in spec.classes:
        check_class_name(label)
    return model, spec


def decoded(images: Images, spec: ModelSpec, options: Options, bar: Bar, title: str) -> list[Tensor]:
    """Return all pictures, prepared for the model, in batches of :data:`BATCH`.

    Raises:
        CorruptImageError: naming the first one that cannot be read, unless ``options`` say to go on without them.
    """
    loader = make_loader(
        images, make_transform(spec.preprocessing), BATCH, shuffle=False, workers=options.workers, seed=options.seed
    )
    batches, unreadable = [], []
    with timed_task(bar, title, len(loader)) as task:
        for batch in readable(loader, skip_corrupt=options.skip_corrupt):
            unreadable += batch.unreadable
            if len(batch.labels):
                batches.append(batch.images)
            bar.update(task, advance=1)
    if unreadable:
        bar.console.print(f"Unreadable {title} skipped: {len(unreadable)}.")
    return batches


@contextmanager
def timed_task(bar: Bar, title: str, total: float | None = None) -> Iterator[Any]:
    """Show a task, whose number is given, while the block runs, and then how long it took."""
    number, began = bar.add_task(title, total=total), time.perf_counter()
    yield number
    bar.remove_task(number)
    bar.console.print(f"{title}: {time.perf_counter() - began:.1f} s")
