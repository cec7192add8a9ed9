"""The command that puts a packed model behind HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from qvit.cli.options import Packed
from qvit.files import printable


def serve(
    model: Packed,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for all of the machine's addresses.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 for any that is free.", min=0, max=65535)] = 8000,
    top_k: Annotated[int, typer.Option(help="Classes an image.", min=1)] = 5,
    threads: Annotated[
        int,
        typer.Option(help="Of an engine; there are as many engines as the processors have room for.", min=1),
    ] = 1,
    queue: Annotated[int, typer.Option(help="Pictures that may wait; the answer to others is 503.", min=1)] = 128,
    max_bytes: Annotated[int, typer.Option(help="Of a request's body; a larger one is refused.", min=1)] = 16 * 2**20,
) -> None:
    """Serve a packed model over HTTP: POST /predict, GET /health, GET /metrics. Needs no PyTorch.

    A request is one picture, as its body or in a form; the answer is JSON: classes, or the vector of a feature
    extractor. SIGTERM stops the server when all requests that have come are answered.

    Examples:
      qvit serve model.safetensors --port 8000
      qvit serve model.safetensors --host 0.0.0.0 --threads 4 --top-k 1
    """
    from qvit.serving.server import serve as run

    def report(start: str) -> None:
        print(printable(f"{model}: {start}"), flush=True)

    run(
        model,
        host,
        port,
        threads=threads,
        top_k=top_k,
        waiting=queue,
        largest_body=max_bytes,
        report=report,
    )
