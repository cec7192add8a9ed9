"""Pictures that wait, computed together: async-batcher collects them, and each batch goes to one of several engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numpy as np
from async_batcher.batcher import AsyncBatcher
from numpy.typing import NDArray
from prometheus_client import Histogram

from qvit.errors import CorruptImageError
from qvit.runtime.engine import Engine
from qvit.runtime.preprocess import preprocess

LARGEST_BATCH = 2
"""Pictures of a batch; engines are as fast with more of them, and the first one would wait for the last."""
Answer = dict[str, Any]
_SIZES = Histogram("qvit_batch_pictures", "Pictures that were computed together", buckets=range(1, LARGEST_BATCH + 1))


class Batcher(AsyncBatcher[bytes, Answer]):
    """Answers pictures: as many batches at once as there are engines, and a queue of those that wait.

    No picture waits for others to come: an engine that is free takes what is there.

    Args:
        engines: of one model.
        top_k: classes of a picture.
        waiting: pictures that may wait; :meth:`process` raises ``QueueFullException`` beyond them.
    """

    def __init__(self, engines: Sequence[Engine], *, top_k: int, waiting: int) -> None:
        super().__init__(
            max_batch_size=LARGEST_BATCH,
            max_queue_time=0,
            max_queue_size=waiting,
            concurrency=len(engines),
            executor=ThreadPoolExecutor(len(engines), "engine"),
        )
        self.program = engines[0].program
        self._top_k = top_k
        self._idle: SimpleQueue[Engine] = SimpleQueue()
        for engine in engines:
            self._idle.put(engine)

    def process_batch(self, batch: list[bytes]) -> list[Answer | CorruptImageError]:
        """Return what each picture shows; of one that cannot be read, the error. Called in the executor's threads."""
        _SIZES.observe(len(batch))
        engine = self._idle.get()  # there is one: no more batches run at once than there are engines
        try:
            return answers(engine, batch, self._top_k)
        finally:
            self._idle.put(engine)


def answers(engine: Engine, pictures: Sequence[bytes], top_k: int) -> list[Answer | CorruptImageError]:
    """Return the answer to each picture, as JSON takes it, or the error of one that cannot be read.

    Of a classifier ``{"classes": [{"name": ..., "probability": ...}, ...]}``, the ``top_k`` most probable first; of a
    feature extractor ``{"embedding": [...]}``.
    """
    prepared = np.empty((len(pictures), *engine.program.input), np.float32)
    errors = [_error(engine, picture, slot) for picture, slot in zip(pictures, prepared, strict=True)]
    readable = [error is None for error in errors]
    told = _told(engine, engine(prepared if all(readable) else prepared[readable]), top_k)
    return [next(told) if error is None else error for error in errors]


def _error(engine: Engine, picture: bytes, slot: NDArray[np.float32]) -> CorruptImageError | None:
    """Prepare a picture in its ``slot`` of a batch, or return why it cannot be read."""
    try:
        preprocess(picture, engine.preprocessing, "The picture", slot)
    except CorruptImageError as error:
        return error
    return None


def _told(engine: Engine, outputs: NDArray[np.float32], top_k: int) -> Iterator[Answer]:
    if not engine.program.classifies:
        yield from ({"embedding": vector} for vector in outputs.tolist())
        return
    for best in engine.most_probable(outputs, top_k):
        yield {"classes": [{"name": name, "probability": probability} for name, probability in best]}
