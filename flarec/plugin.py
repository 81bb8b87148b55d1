"""Everything that a plugin needs, under one name. What is here stays here; the modules behind it may move.

A pass is a frozen dataclass that derives from `Pass`; a property is a name with a checker; a mixer op is a `Mixer`. How
a plugin is written and used: CONTRIBUTING.md, and `examples/plugin/` for one that is complete.
"""

from .errors import PassError, PropertyError, UsageError
from .ir.pipeline import Claims, Pass, Property
from .ir.program import Derivation, Program, layer_of, locate, module_of, target_name
from .ir.spec import LENGTH, ROWS, TensorSpec
from .layout import Layout
from .ops import Form, FormDerivation, Mixer, Site, Slot, mixer_of, register, sites
from .ops.mixer import plain_layout
from .passes.narrow_head import find_head
from .passes.token_local import declare_token_local

__all__ = [
    "LENGTH",
    "ROWS",
    "Claims",
    "Derivation",
    "Form",
    "FormDerivation",
    "Layout",
    "Mixer",
    "Pass",
    "PassError",
    "Program",
    "Property",
    "PropertyError",
    "Site",
    "Slot",
    "TensorSpec",
    "UsageError",
    "declare_token_local",
    "find_head",
    "layer_of",
    "locate",
    "mixer_of",
    "module_of",
    "plain_layout",
    "register",
    "sites",
    "target_name",
]
