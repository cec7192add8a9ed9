"""Pictures that wait, computed together: each engine has a thread, which takes its share of them when it is free."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Histogram

from qvit.config import check_count
from qvit.errors import CorruptImageError
from qvit.runtime.engine import Engine
from qvit.runtime.preprocess import preprocess

LARGEST_BATCH = 4
"""Pictures of a batch; engines are as fast with more of them, and the first one would wait for the last."""
Answer = dict[str, Any]
_SIZES = Histogram("qvit_batch_pictures", "Pictures that were computed together", buckets=range(1, LARGEST_BATCH + 1))


class _Waiting(NamedTuple):
    picture: bytes
    answer: asyncio.Future[Answer]


class Batcher:
    """Answers pictures while it is entered as a context: as many batches at once as there are engines.

    No picture waits for others to come: an engine that is free takes what is there, or its part of it where others are
    free too.

    Args:
        engines: of one model.
        top_k: classes of a picture.
        waiting: pictures that may wait.
    """

    def __init__(self, engines: Sequence[Engine], *, top_k: int, waiting: int) -> None:
        check_count("top_k", top_k)
        check_count("waiting", waiting)
        self.program = engines[0].program
        self._top_k = top_k
        self._most = waiting
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._free = 0
        self._open = True
        self._change = threading.Condition()
        self._threads = [threading.Thread(target=self._work, args=[engine], name="engine") for engine in engines]

    def __enter__(self) -> Batcher:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads when they have answered what they compute; what waits still is not answered."""
        with self._change:
            self._open = False
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    async def answer(self, picture: bytes) -> Answer:
        """Return what a picture shows, as :func:`answers` has it.

        Raises:
            CorruptImageError: if it cannot be read.
            queue.Full: if as many as may wait do.
        """
        item = _Waiting(picture, asyncio.get_running_loop().create_future())
        with self._change:
            if len(self._waiting) >= self._most:
                raise queue.Full
            self._waiting.append(item)
            self._change.notify()
        return await item.answer

    def _work(self, engine: Engine) -> None:
        """Answer pictures with one engine: a thread."""
        while batch := self._taken():
            _SIZES.observe(len(batch))
            told: Sequence[Answer | Exception]
            try:
                told = answers(engine, [item.picture for item in batch], self._top_k)
            except Exception as error:  # a fault of the program: the clients hear of it, the thread goes on
                told = [error] * len(batch)
            with contextlib.suppress(RuntimeError):  # the loop has been closed: no client is left
                batch[0].answer.get_loop().call_soon_threadsafe(_settle, batch, told)

    def _taken(self) -> list[_Waiting]:
        """Return the next batch as soon as there is one, or none at the end."""
        with self._change:
            self._free += 1
            self._change.wait_for(lambda: self._waiting or not self._open)
            count = min(-(-len(self._waiting) // self._free), LARGEST_BATCH) if self._open else 0
            self._free -= 1
            return [self._waiting.popleft() for _ in range(count)]


def _settle(batch: Sequence[_Waiting], told: Sequence[Answer | Exception]) -> None:
    for item, answer in zip(batch, told, strict=True):
        if item.answer.done():  # cancelled: its client is gone
            continue
        if isinstance(answer, Exception):
            item.answer.set_exception(answer)
        else:
            item.answer.set_result(answer)


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
