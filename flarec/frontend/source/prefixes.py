"""What other programs put before the names of a model's tensors, and how it is taken away."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

TEXT_PREFIXES = {r"^language_model\.model\.": "model.", r"^language_model\.lm_head\.": "lm_head.",
                 r"^model\.language_model\.": "model."}
"""Names of the text model's tensors in the files of wrappers (both layouts in use) -> names in its own class."""
WRAPPINGS = {
    r"^base_model\.model\.": "", r"^module\.": "", r"_forward_module\.": "", r"_orig_mod\.": "",
    r"_fsdp_wrapped_module\.": "", r"_checkpoint_wrapped_module\.": "",
}
"""What peft, DataParallel, DeepSpeed, torch.compile and FSDP add to names, in the order in which it is taken away."""


def mapping_of(names: Iterable[str]) -> dict[str, str]:
    """Patterns that make the names of a plain text model from stored ones, those that are met; often none."""
    names = list(names)
    found = {}
    for pattern, replacement in (WRAPPINGS | TEXT_PREFIXES).items():
        if any(re.search(pattern, name) for name in names):
            found[pattern] = replacement
            names = [re.sub(pattern, replacement, name, count=1) for name in names]
    return found


def renamed(name: str, mapping: Mapping[str, str]) -> str:
    """A stored name as `mapping` makes it."""
    for pattern, replacement in mapping.items():
        name = re.sub(pattern, replacement, name, count=1)
    return name


def shared_prefix(stored: Iterable[str], wanted: Iterable[str]) -> str:
    """What stands before most wanted names in the stored ones; empty if there is nothing of the kind."""
    counts: dict[str, int] = {}
    known = list(stored)
    wanted = set(wanted)
    for name in known:
        pieces = name.split(".")
        for cut in range(1, len(pieces)):
            if ".".join(pieces[cut:]) in wanted:
                prefix = ".".join(pieces[:cut]) + "."
                counts[prefix] = counts.get(prefix, 0) + 1
                break
    best = max(counts, key=lambda prefix: counts[prefix], default="")
    return best if counts.get(best, 0) * 2 > len(known) else ""
