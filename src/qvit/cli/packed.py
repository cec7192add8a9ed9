"""Commands about packed files: export, web, predict, bench, info, push."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qvit.cli.options import Packed, console, parse_numbers
from qvit.errors import CorruptImageError
from qvit.files import all_or_none, check_new, printable, write_atomically, write_text


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
            print(f"qvit: {printable(error)}", file=sys.stderr)
            results.append({"image": str(image), "error": str(error)})
            continue
        results.append({"image": str(image), "classes": [{"name": n, "probability": p} for n, p in best]})
        if not as_json:  # plain text: the import of rich takes as long as the model does
            print(
                printable(image), *(f"  {probability:7.2%}  {printable(name)}" for name, probability in best), sep="\n"
            )
    if as_json:
        print(json.dumps(results, indent=2))
    if any("error" in result for result in results):
        raise typer.Exit(2)


def bench(
    model: Packed,
    batch: Annotated[str, typer.Option(help="Images an inference, comma-separated.")] = "1,8",
    threads: Annotated[str | None, typer.Option(help="Comma-separated [default: all processors].")] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="What to compare with, comma-separated, or none: torch, torch-compile, torch-bf16, "
            "torch-compile-bf16, onnxruntime, onnxruntime-transformers, onnxruntime-dynamic, onnxruntime-static, "
            "openvino, openvino-default, openvino-int8 [default: all that are installed]."
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

    from qvit.bench.compare import compare
    from qvit.bench.peers import PEERS
    from qvit.runtime.processors import processors

    if figure is not None:
        from qvit.analysis.figures import latency_bars, png
    outputs = [path for path in (figure, json_file) if path is not None]
    check_new(outputs)
    chosen = list(PEERS) if peers is None else [name for name in peers.split(",") if name and name != "none"]
    comparison = compare(
        {f"qvit, {printable(model.name)}": model},
        parse_numbers("--batch", batch),
        [processors()] if threads is None else parse_numbers("--threads", threads),
        peers=chosen,
        rounds=rounds,
        report=lambda message: console().print(printable(message), style="dim"),
    )
    console().print(comparison.table(printable(f"{model}, {comparison.machine['cpu']}")))
    for line in comparison.notes():
        console().print(printable(line))
    with all_or_none(outputs):
        if figure is not None:
            data = png(latency_bars(comparison.panels(), comparison.packed))
            write_atomically(figure, lambda temporary: temporary.write_bytes(data))
        if json_file is not None:
            write_text(json_file, json.dumps(comparison.to_dict(), indent=1))


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="What qvit train wrote: best.pt or last.pt of a quantized model; for ONNX also a packed model.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="MODEL", help="File to write, e.g. model.safetensors or model.onnx.")],
    exact: Annotated[
        bool, typer.Option("--exact", help="ONNX: multiply codes as integers, not dequantized (QDQ).")
    ] = False,
    opset: Annotated[
        int | None,
        typer.Option(help="ONNX: version of the operators, 21..25 [default: 21, or 25 where weights have 2 bits]."),
    ] = None,
) -> None:
    """Write a quantized checkpoint as one small file: a packed model, which runs without PyTorch, or an ONNX file.

    Examples:
      qvit export runs/q4/best.pt model.safetensors
      qvit export model.safetensors model.onnx --exact
    """
    from qvit.exporting.files import export_file

    export_file(checkpoint, out, exact=exact, opset=opset)
    size = out.stat().st_size / 1e6
    more = (
        "its metadata says how images are prepared" if out.suffix == ".onnx" else f"qvit info {out} says what is in it"
    )
    console().print(printable(f"{out}: {size:.2f} MB; {more}."), soft_wrap=True)


def web(
    model: Packed,
    out: Annotated[Path, typer.Option(help="Folder to write, for any web server; must not be there.")],
) -> None:
    """Write a web page that classifies pictures with a packed model, in the browser: nothing is sent anywhere.

    The folder is also a module for JavaScript, qvit.js, in the browser and in Node. Needs no PyTorch.

    Example:
      qvit web model.safetensors --out site
    """
    from qvit.exporting.web_site import MODEL, write_site

    write_site(model, out)
    size = (out / MODEL).stat().st_size / 1e6
    text = f"{out}: a page with a model of {size:.2f} MB; to see it, python -m http.server --directory {out}"
    console().print(printable(text), soft_wrap=True)


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

    console().print(printable(push_to_hub(file, repository, private=private)), soft_wrap=True)


def info(model: Packed) -> None:
    """Print what a packed model is: architecture, bits, size by part, preprocessing. Needs no PyTorch.

    Example:
      qvit info model.safetensors
    """
    from qvit.runtime.info import info_tables

    for table in info_tables(model):
        console().print(table)
