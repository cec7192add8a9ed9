"""Models to the Hugging Face Hub and back: checkpoints and packed files, with a model card.

A repository holds ``checkpoint.pt`` (to evaluate, to go on with) or ``model.safetensors`` (the packed file), and a
``README.md`` that says what it is. PyTorch is needed for checkpoints alone.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import huggingface_hub
import yaml
from huggingface_hub.errors import HFValidationError

from qvit.errors import CheckpointError, HubError
from qvit.files import first_line, printable, write_text
from qvit.format.packed import PackedModel, read_packed, write_packed
from qvit.models.fetch import CHECKPOINT, PREFIX, fetch
from qvit.runtime.engine import Engine, load

if TYPE_CHECKING:
    from timm.models import VisionTransformer

    from qvit.models.spec import ModelSpec

PACKED = "model.safetensors"


def push_to_hub(path: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a checkpoint or a packed file with a model card, and return the address of the commit.

    Of a checkpoint the weights and the spec are uploaded, not the optimizer's state. The token is the one that
    ``hf auth login`` or the variable ``HF_TOKEN`` left.

    Args:
        path: what ``qvit train`` or ``qvit export`` wrote.
        repository: ``OWNER/NAME``; made if it is not there.
        private: whether to make it private.

    Raises:
        CheckpointError: if the checkpoint cannot be read; PackedFileError likewise.
        HubError: if the Hub refuses or cannot be reached.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix="qvit-push-") as folder:
        content: ModelSpec | PackedModel
        if path.suffix == ".safetensors":
            content = read_packed(path)
            file = Path(folder) / PACKED
            write_packed(file, content)
        else:
            from qvit.models.checkpoint import load_checkpoint, write_checkpoint

            model, content = load_checkpoint(path)
            file = Path(folder) / CHECKPOINT
            write_checkpoint(file, content, model)
        write_text(Path(folder) / "README.md", model_card(content, repository, file.stat().st_size))
        try:
            api = huggingface_hub.HfApi()
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload {file.name}")
        except (OSError, HFValidationError) as error:
            raise HubError(f"The Hub does not take {repository}: {first_line(error)}") from error
    return str(commit)


@overload
def from_pretrained(repository: str, *, packed: Literal[False] = False) -> tuple[VisionTransformer, ModelSpec]: ...


@overload
def from_pretrained(repository: str, *, packed: Literal[True]) -> Engine: ...


def from_pretrained(repository: str, *, packed: bool = False) -> tuple[VisionTransformer, ModelSpec] | Engine:
    """Return what :func:`push_to_hub` uploaded: a checkpoint's model and spec, or an engine that runs the packed file.

    Args:
        repository: ``OWNER/NAME``; ``@REVISION`` may follow.
        packed: whether the packed file is wanted.

    Raises:
        HubError: if the Hub cannot hand it out.
        CheckpointError: if the file is not there or damaged; PackedFileError likewise.
    """
    name = PACKED if packed else CHECKPOINT
    path = fetch(repository.removeprefix(PREFIX), [name]) / name
    if not path.exists():
        raise CheckpointError(f"{repository} has no {name}.")
    if packed:
        return load(path)
    from qvit.models.checkpoint import load_checkpoint

    return load_checkpoint(path)


def model_card(content: ModelSpec | PackedModel, repository: str, size: int) -> str:
    """Return the ``README.md`` of a repository: what the model is, how good, how large, and how it was made.

    Args:
        content: spec of a checkpoint, or packed model.
        repository: ``OWNER/NAME``.
        size: bytes of the file.
    """
    if not isinstance(content, PackedModel):
        origin: dict[str, Any] = {"method": content.method, "metrics": content.metrics, "recipe": content.recipe}
        name, quantization = content.name, content.quant_config
        use = f'import qvit.hub\n\nmodel, spec = qvit.hub.from_pretrained("{repository}")'
    else:
        name, origin = content.program.name, dict(content.origin)
        bits = content.program.usual_bits()  # all that is known of one that was exported from Python
        quantization = origin.get("quantization") or {"weight_bits": bits.weight, "activation_bits": bits.activation}
        use = (
            f'import qvit.hub\n\nengine = qvit.hub.from_pretrained("{repository}", packed=True)\n'
            f'print(engine.{"predict" if content.classes else "embed"}("image.jpg"))'
        )
    task = "image-classification" if content.classes else "image-feature-extraction"
    purpose = f"for {len(content.classes)} classes" if content.classes else "without a classifier, for its vectors"
    lines = ["---", "library_name: qvit", f"pipeline_tag: {task}", "tags: [qvit, vision, quantization]"]
    title = f"# {repository.rpartition('/')[2]}"
    lines += ["---", "", title, "", f"{printable(name)} {purpose}, "]
    if quantization is None:
        lines[-1] += "in full precision."
    else:
        lines[-1] += (
            f"{quantization['weight_bits']}-bit weights and {quantization['activation_bits']}-bit activations, every "
            "linear layer and both attention products quantized by qvit."
        )
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| {key} | {printable(value)} |" for key, value in _facts(content, origin, quantization, size).items()]
    lines += ["", "```python", use, "```", ""]
    if origin.get("recipe"):
        lines += ["Recipe:", "", "```yaml", yaml.safe_dump(origin["recipe"], sort_keys=False).rstrip(), "```", ""]
    return "\n".join(lines)


def _facts(
    content: ModelSpec | PackedModel, origin: dict[str, Any], quantization: dict[str, Any] | None, size: int
) -> dict[str, str]:
    metrics = origin.get("metrics") or {}
    facts = {}
    if "val_top1" in metrics:
        images = f" on {metrics['val_images']:.0f} validation images" if "val_images" in metrics else ""
        facts["accuracy"] = f"top-1 {metrics['val_top1']:.2f} %, top-5 {metrics['val_top5']:.2f} %{images}"
    if quantization is not None:
        facts["bits"] = f"weights {quantization['weight_bits']}, activations {quantization['activation_bits']}"
        if "rectifier" in quantization:
            facts["rectification"] = str(quantization["rectifier"] or "none")
        if quantization.get("overrides"):
            facts["other bits"] = ", ".join(f"{name}: {bits}" for name, bits in quantization["overrides"].items())
    facts["method"] = str(origin.get("method", "unknown"))
    facts["size"] = f"{size / 1e6:.2f} MB"
    facts["input"] = " × ".join(str(side) for side in content.preprocessing["input_size"])
    return facts
