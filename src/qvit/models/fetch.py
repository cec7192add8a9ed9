"""Files from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from qvit.errors import HubError
from qvit.files import first_line

if TYPE_CHECKING:
    pass


PREFIX = "hf-hub:"
CHECKPOINT = "checkpoint.pt"


def fetch(repository: str, patterns: list[str]) -> Path:
    """Return the folder with a snapshot of ``OWNER/NAME[@REVISION]``: its files with one of the names ``patterns``.

    Raises:
        HubError: if the Hub does not hand it out.
    """
    name, _, revision = repository.partition("@")
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except (OSError, HFValidationError) as error:
        raise HubError(f"The Hub does not hand out {repository}: {first_line(error)}") from error
