"""Print which of timm's names qvit quantizes and can write as a packed file, family by family, and why not the others.

Models are made without memory for their weights (the meta device), so that all of them take about a minute:

    python benchmarks/families.py                 # the table, in Markdown
    python benchmarks/families.py --patterns 'swin*'
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable

import timm
import torch

from qvit import quantize
from qvit.errors import QvitError
from qvit.models.families import family_of

PATTERNS = ("vit_*", "deit*", "swin*", "beit*", "eva*", "flexivit*")
HYBRID = re.compile(r"patch_embed \((?!PatchEmbed)")
"""Of a refusal: the model begins with convolutions, so it is no transformer alone."""


def refusal(name: str) -> tuple[str, str]:
    """Return the family of a timm model and why it is refused; an empty reason if it is not."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(name)
        try:
            family = family_of(model).__name__.rpartition(".")[2]
        except QvitError:
            return "none", f"{type(model).__name__} is of no family that qvit knows"
        try:
            quantize(model)
        except QvitError as error:
            return family, str(error)
    return family, ""


def report(names: Iterable[str]) -> str:
    """Return the table of ``names`` and the refusals, in Markdown."""
    covered: Counter[str] = Counter()
    reasons: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        family, reason = refusal(name)
        if reason:
            reasons[family, re.sub(r"\d+", "N", reason)].append(name)
        else:
            covered[family] += 1
    refused = Counter(dict.fromkeys(covered, 0))
    hybrids = 0
    for (family, reason), names in reasons.items():
        if HYBRID.search(reason):
            hybrids += len(names)
        else:
            refused[family] += len(names)
    total, transformers = covered.total(), covered.total() + refused.total()
    rows = [f"| {family} | {covered[family]} | {refused[family]} |" for family in sorted(refused)]
    why = [
        f"- {len(names)} ({'hybrid, ' if HYBRID.search(reason) else ''}{family}): {reason} {', '.join(names)}"
        for (family, reason), names in sorted(reasons.items())
    ]
    share = f"{total} of {transformers} transformers ({total / transformers:.1%}), and {hybrids} hybrids beside them."
    return "\n".join(["| family | names covered | refused |", "|---|---|---|", *rows, "", share, "", *why])


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="of timm's names")
    print(report(timm.list_models(list(parser.parse_args().patterns))))


if __name__ == "__main__":
    main()
