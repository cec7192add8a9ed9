"""Files of weights, whoever wrote them: PyTorch's, safetensors, and both in several parts. No code of theirs runs."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from qvit.errors import CheckpointError
from qvit.files import shown
from qvit.kinds import kind_of

INDEX = ".index.json"
WEIGHTS = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
"""What a folder of ``save_pretrained`` may hold its weights in, the first that is there counts."""
MAX_CLASSES = 100
"""Classes of other programs in one file; PyTorch's reader compares every object with all of them."""
_BLOCKED = ("sys", "os", "posix", "nt")
_MAPPINGS: dict[str, Callable[..., Any]] = {
    "collections.defaultdict": lambda *_: {},
    "lightning_fabric.utilities.data.AttributeDict": dict,
    "lightning.fabric.utilities.data.AttributeDict": dict,
    "pytorch_lightning.utilities.parsing.AttributeDict": dict,
}


class StandIn:
    """Takes the place of an object of a class that PyTorch does not read by itself: keeps its state, and does nothing.

    Training programs put their settings beside the weights (``argparse.Namespace`` and the like).
    """

    __slots__ = ("state",)

    def __new__(cls, *args: Any) -> StandIn:
        """Make one of any arguments, none of which is looked at."""
        self = super().__new__(cls)
        self.state = None
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """Return an attribute of the object that this one stands for, or ``None``."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def read_file(path: str | Path) -> Any:
    """Return what a file holds: a dictionary of tensors from safetensors, anything plain from PyTorch's.

    Of ``NAME.index.json`` the parts are read that it names, from the same folder.

    Raises:
        CheckpointError: if it is absent or cannot be read, saying what it is as far as that can be told.
    """
    path = Path(path)
    if path.is_dir() and (kind := kind_of(path)) is not None:
        raise CheckpointError(f"{path} is {kind.text}.")
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    if path.name.endswith(INDEX):
        return _read_parts(path)
    return _read_whole(path)


def find_weights(folder: Path, source: str) -> Path:
    """Return the file in ``folder`` that holds a model's weights, or the index of several.

    Raises:
        CheckpointError: if there is none.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    runs = [name for name in ("best.pt", "last.pt") if (folder / name).is_file()]
    hint = f"give {folder / runs[0]}" if runs else f"expected {WEIGHTS[0]} or {WEIGHTS[2]}"
    raise CheckpointError(f"{source} has no weights: {hint}.")


def read_json(path: Path, source: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: if it is absent or no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{source} has no {path.name}.")
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} has no usable {path.name}: it cannot be read as JSON.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{source} has no usable {path.name}: it holds no JSON object.")
    return content


def _read_parts(index: Path) -> dict[str, Any]:
    places = read_json(index, str(index.parent)).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError(f"{index} has no weight_map that tells which file holds which weight.")
    weights: dict[str, Any] = {}
    for name in sorted(set(places.values())):
        part = index.parent / name
        if name != Path(name).name or not part.is_file():
            raise CheckpointError(f"{index} names {shown(name)}, which is no file beside it.")
        content = _read_whole(part)
        if not isinstance(content, dict):
            raise CheckpointError(f"{part} holds no weights by name.")
        weights |= content
    for name in places:
        if name not in weights:
            raise CheckpointError(f"{index} names the weight {shown(name)}, which none of its files holds.")
    return weights


def _read_whole(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings(), safe_globals(_stand_ins(path)):
            warnings.simplefilter("ignore")  # about the version of the pickle, for programmers
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or 'the system refuses it'}.") from error
    except Exception as error:  # a damaged file can fail in the zip reader, the unpickler or the tensor reader
        raise CheckpointError(f"{path} {_what_it_is(path)}.") from error


def _stand_ins(path: Path) -> list[Any]:
    """Return what takes the place of every class or function that a file names and PyTorch does not read by itself."""
    if not zipfile.is_zipfile(path):
        names = ["argparse.Namespace"]  # PyTorch cannot list the names in files of before its version 1.6
    else:
        try:
            names = sorted(get_unsafe_globals_in_checkpoint(path))
        except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError):  # reading it will say what is wrong
            return []
    for name in names:
        if name.partition(".")[0] in _BLOCKED:
            raise CheckpointError(f"{path} holds a call of {shown(name)}: qvit runs no code of a file, and leaves it.")
    if len(names) > MAX_CLASSES:
        raise CheckpointError(f"{path} names {len(names)} classes of other programs, the limit is {MAX_CLASSES}.")
    return [(_MAPPINGS.get(name) or type(name, (StandIn,), {"__slots__": ()}), name) for name in names]


def _what_it_is(path: Path) -> str:
    kind = kind_of(path)
    damaged = ("weights",) if path.suffix == ".safetensors" else ("weights", "checkpoint")  # if that is what they are
    if kind is not None and kind.name not in damaged:
        return f"is {kind.text}"
    with open(path, "rb") as file:
        start = file.read(2)
    if path.suffix == ".safetensors":
        return "is no safetensors file, or was cut short or damaged"
    if start.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            return "was cut short or damaged"
        with zipfile.ZipFile(path) as archive:
            entries = [name.rpartition("/")[2] for name in archive.namelist()]
        if "constants.pkl" in entries:
            return "is a TorchScript archive: save the state_dict() of the model in it, and give that"
        if any(name.endswith(".npy") for name in entries):
            return "is a NumPy archive (JAX): give PyTorch's weights"
        if "data.pkl" not in entries:
            return "is a zip archive of something else"
    return "was damaged, or is no file of PyTorch's that can be read without running code in it"


def names_of(content: Mapping[Any, Any], most: int = 4) -> str:
    """Return the first names in a dictionary from a file, for a message."""
    names = ", ".join(shown(str(name)).strip("'\"") for name in list(content)[:most])
    return f"{names}, ... ({len(content)} entries)" if len(content) > most else names or "nothing"
