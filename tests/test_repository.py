"""Rules of docs/architecture.md and CONTRIBUTING.md that a reader could check by eye, and would forget to."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE_FOLDERS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
PYTHON_FOLDERS = [*PACKAGE_FOLDERS.values(), "tests", "tools", "examples", "benchmarks"]
LONGEST_FILE = 500
LONGEST_FUNCTION = 60  # lines, its docstring not counted
"""But for Triton kernels: each is one program, what it calls is inlined, and spills show in it."""

# Which module belongs to which layer: the longest prefix decides.
AT_THE_ROOT = ("errors", "layout", "device", "collector", "threads")
API = ("api", "hf_generate", "evaluate", "tune")
KERNELS = tuple(sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py")))
ROOMS = (
    "base", "recipe", "ir", "ops", "frontend", "passes", "checkpoint", "train", "decode", "serve", "verify", "inspect",
    "bench", "conformance", "doctor", "evaluation", "report", "screen", "cli",
)
LAYER_OF = {
    "flarec": "root",  # flarec/__init__.py: the version, no imports
    **{f"flarec.{name}": name for name in (*AT_THE_ROOT, *ROOMS)},
    "flarec.bench.serving": "serving",
    "flarec.bench.training": "training",  # measures what the doctor predicts: nothing imports it but the command
    "flarec.serve.vllm": "vllm",  # imported where vLLM runs, which has no need of the server's other parts
    "flarec.evaluation.harness": "harness",  # imports lm-eval; nothing of the package imports it
    "flarec.ir.slots": "slots",  # all that the decoder knows of a program
    "flarec.recipes": "recipes",
    "flarec.kernels": "kernels",
    **{f"flarec.kernels.{name}": f"kernels.{name}" for name in KERNELS},
    **{f"flarec.{name}": "api" for name in API},
    "flarec.plugin": "plugin",  # what plugins import; nothing of the package imports it
    "flarec.__main__": "cli",
}

# What each layer may import, besides itself, flarec.errors and flarec/__init__.py. A kernel imports no other kernel.
ALL_KERNELS = {"kernels", *(f"kernels.{name}" for name in KERNELS)}
BELOW_CLI = set(LAYER_OF.values()) - {"cli", "plugin", "training"}
MAY_IMPORT: dict[str, set[str]] = {
    "root": set(),
    "errors": set(),
    "base": set(),
    "layout": {"base"},
    "device": set(),
    "collector": set(),
    "threads": set(),
    "slots": set(),
    "recipe": {"recipes", "layout", "base"},
    "recipes": set(),
    "kernels": {"layout", "base"},
    **{f"kernels.{name}": {"kernels", "layout", "base"} for name in KERNELS},
    "ops": {*ALL_KERNELS, "base", "layout"},
    "ir": {"layout", "slots"},
    "frontend": {"ops", "ir", "base"},
    "passes": {"ops", "ir", "layout", "slots"},
    "decode": {"layout", "slots", "base", "kernels.sampling", "kernels.drafts"},
    "plugin": {"ir", "layout", "ops", "passes"},
    "train": {
        "ops", "ir", "layout", "recipe", "device", "decode", "recipes", "frontend", "passes", "checkpoint",
        "base", "kernels.row_losses", "threads",
    },
    "serve": {"base", "decode"},  # of a model it knows what `flarec.serve.prompts.Served` says
    "vllm": {"base", "checkpoint"},  # of the latter what reads JSON files: tests/serve/test_vllm_checks.py
    "conformance": BELOW_CLI - {"doctor", "serve", "screen", "vllm"},
    "doctor": BELOW_CLI - {"conformance", "serve", "screen", "vllm"},
    "verify": BELOW_CLI - {"conformance", "doctor", "serve", "screen", "vllm"},
    "screen": {"api", "base", "checkpoint", "decode", "evaluation", "recipe", "train"},
    "inspect": BELOW_CLI - {"train", "decode", "serve", "vllm", "verify", "bench", "conformance", "doctor", "screen"},
    "bench": {*ALL_KERNELS, "ops", "layout", "base"},
    "serving": {*ALL_KERNELS, "bench", "base", "decode", "frontend", "ir", "passes"},
    "training": {"bench", "device", "doctor", "frontend", "passes", "recipe", "train"},
    "checkpoint": {"frontend", "ir", "layout", "passes", "base"},
    "evaluation": {"decode", "base"},
    "report": {"api", "base", "checkpoint", "decode", "evaluation", "train"},
    "harness": {"api", "base", "decode", "evaluation"},
    "api": {
        "device", "collector", "threads", "base", "frontend", "passes", "ir", "decode", "checkpoint", "train",
        "evaluation",
    },
    "cli": BELOW_CLI | {"training"},
}

# transformers enters in capture and leaves in checkpoint: what lies between knows a program and a layout.
KNOWS_TRANSFORMERS = {
    "bench", "serving", "training", "frontend", "checkpoint", "api", "verify", "conformance", "doctor", "cli"
}
# numpy: schedules are index arithmetic on the host.
KERNEL_LIBRARIES = {"torch", "triton", "numpy"}

# A test that reads a clock, sleeps or stops waiting fails on a busy machine. Times belong into benchmarks/, as ratios
# within one run; tests count calls (tests/counting.py) or bring a clock. What hangs is ended by pytest's own timeout.
CLOCK_MODULES = {"time", "timeit", "datetime", "sched", "psutil"}
CLOCKS = {
    "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time", "process_time_ns", "thread_time",
    "thread_time_ns", "time_ns", "clock_gettime", "getrusage", "sleep", "alarm", "setitimer", "elapsed_time",
}
WAITS = {"timeout", "deadline"}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """The name under which a file of the package folders is imported."""
    for package, folder in PACKAGE_FOLDERS.items():
        if path.is_relative_to(ROOT / folder):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            return ".".join([package, *(part for part in parts if part != "__init__")])
    raise AssertionError(path)


def layer_of(module: str) -> str | None:
    """The layer of a module, None if no prefix of it but `flarec` itself is in the table."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        layer = LAYER_OF.get(".".join(parts[:length]))
        if layer is not None:
            return layer if length > 1 or len(parts) == 1 else None
    return None


def imports(source: str, module: str, is_package: bool, modules: set[str]) -> Iterator[tuple[int, str]]:
    """(line, imported module) of every import in a file, those inside functions and TYPE_CHECKING included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            for alias in node.names:  # `from flarec import layout` imports the module flarec.layout
                yield node.lineno, f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base


PACKAGE_FILES = python_files(*PACKAGE_FOLDERS.values())
MODULES = {module_name(path) for path in PACKAGE_FILES if "templates" not in path.parts}
EDGES = [
    (module_name(path), f"{path.relative_to(ROOT)}:{line}", target)
    for path in PACKAGE_FILES
    if "templates" not in path.parts  # files that are written into checkpoints, not part of the package
    for line, target in imports(path.read_text(), module_name(path), path.name == "__init__.py", MODULES)
]


def illegal(importer: str, imported: str) -> bool:
    """Whether the tables forbid that one module of flarec imports another."""
    own, other = layer_of(importer), layer_of(imported)
    return own is None or other not in MAY_IMPORT[own] | {own, "errors", "root"}


def test_every_module_has_a_layer() -> None:
    assert sorted(module for module in MODULES if layer_of(module) is None) == []
    assert set(MAY_IMPORT) == set(LAYER_OF.values())


def test_the_root_holds_few_modules() -> None:
    """A new reader finds the data flow in the listing: everything else has a room."""
    at_the_root = {path.stem for path in (ROOT / "flarec").glob("*.py")}
    assert at_the_root == {*AT_THE_ROOT, *API, "__init__", "__main__", "plugin"}


def test_layers_have_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {layer for layer, below in MAY_IMPORT.items() if below - {layer} <= done} - done
        assert ready, f"these layers import each other: {sorted(set(MAY_IMPORT) - done)}"
        done |= ready


def test_modules_have_no_import_circle() -> None:
    """Imports inside functions count: a circle that is only tied late is still one."""
    graph = nx.DiGraph((module, target) for module, _, target in EDGES if target in MODULES and target != module)
    assert [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1] == []


def test_import_direction() -> None:
    ours = [edge for edge in EDGES if edge[2].split(".")[0] == "flarec"]
    assert [f"{place} imports {target}" for module, place, target in ours if illegal(module, target)] == []


def test_the_tables_refuse_what_they_should() -> None:
    assert illegal("flarec.kernels.short_conv.reference", "flarec.kernels.linear_attention.reference")
    assert illegal("flarec.kernels.short_conv", "flarec.ops")
    assert illegal("flarec.decode.engine", "flarec.passes.lower_mixers")
    assert illegal("flarec.layout", "flarec.ir.program")
    assert not illegal("flarec.kernels.short_conv.windows", "flarec.layout")
    source = "from ..short_conv import windows\ndef f():\n    from .. import short_conv"
    found = imports(source, "flarec.kernels.linear_attention.reference", False, {"flarec.kernels.short_conv"})
    assert [target for _, target in found] == ["flarec.kernels.short_conv"] * 2


def test_only_the_ends_know_transformers() -> None:
    users = [(place, layer_of(module)) for module, place, target in EDGES if target.split(".")[0] == "transformers"]
    assert [place for place, layer in users if layer not in KNOWS_TRANSFORMERS] == []


def test_kernels_import_only_torch_and_triton() -> None:
    known = KERNEL_LIBRARIES | {"flarec"} | sys.stdlib_module_names
    ours = [(place, target) for module, place, target in EDGES if module.startswith("flarec.kernels")]
    assert [f"{place} imports {target}" for place, target in ours if target.split(".")[0] not in known] == []


def test_mypy_knows_the_files_with_triton_kernels() -> None:
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    listed = {name for table in tables for name in table["module"] if name.startswith("flarec.kernels.")}
    assert listed == {module_name(path) for path in PACKAGE_FILES if "\n@triton.jit" in path.read_text()}


@pytest.mark.parametrize("folder", PYTHON_FOLDERS)
def test_files_are_short(folder: str) -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files(folder)}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_a_class_name_means_one_class() -> None:
    files: dict[str, list[str]] = {}
    for path in PACKAGE_FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                files.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in files.items() if len(found) > 1} == {}


def test_no_comment_speaks_to_a_formatter() -> None:
    """Lines are laid out by hand: tables stay tables. `ruff check` holds the width and the order of imports."""
    files = python_files(*PYTHON_FOLDERS, "tests_fla", "tests_peft", "tests_quantized", "tests_lm_eval", "tests_vllm")
    assert [str(path.relative_to(ROOT)) for path in files if re.search(r"#\s*(fmt|yapf):", path.read_text())] == []


def function_lengths(source: str) -> Iterator[tuple[str, int]]:
    """(name, lines without docstring) of every function but Triton kernels."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list):
                continue
            text = node.body[0] if ast.get_docstring(node) is not None else None
            documented = text.end_lineno - text.lineno + 1 if text is not None and text.end_lineno else 0
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1 - documented


def test_functions_are_short() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in PACKAGE_FILES
        for name, length in function_lengths(path.read_text())
        if length > LONGEST_FUNCTION
    }
    assert found == set()


def test_the_rule_about_functions_counts_what_it_should() -> None:
    source = "@triton.jit\ndef kernel():\n    pass\nclass A:\n  def f(self):\n    '''One.\n\n    Two.'''\n    pass"
    assert list(function_lengths(source)) == [("f", 2)]


def test_packages_hold_no_unfinished_work() -> None:
    marker = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError|NotImplemented)\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in PACKAGE_FILES
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if marker.search(line)
    ]
    assert found == []


def clock_uses(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of every clock that a file reads, and of every wait that it ends by one."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] in CLOCK_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names if node.module in CLOCK_MODULES or alias.name in CLOCKS]
        elif isinstance(node, ast.Attribute):
            names = [node.attr] if node.attr in CLOCKS | WAITS else []
        elif isinstance(node, ast.keyword):
            names = [node.arg] if node.arg in WAITS and ast.unparse(node.value) != "None" else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("__import__", "import_module")):
            first = node.args[0] if node.args else None
            names = [str(first.value)] if isinstance(first, ast.Constant) and first.value in CLOCK_MODULES else []
        yield from ((getattr(node, "lineno", 0), name) for name in names)


def test_tests_read_no_clock() -> None:
    files = python_files("tests", "tests_fla", "tests_peft", "tests_quantized", "tests_lm_eval", "tests_vllm")
    found = [f"{p.relative_to(ROOT)}:{line}: {name}" for p in files for line, name in clock_uses(p.read_text())]
    assert found == []


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import time", ["time"]),
        ("from time import process_time as now", ["process_time"]),
        ("from flarec.doctor.rates import time\nassert time.perf_counter() < 3", ["perf_counter"]),
        ("seconds = __import__('time')", ["time"]),
        ("clock = importlib.import_module('timeit')", ["timeit"]),
        ("process.wait(timeout=20)", ["timeout"]),
        ("pytestmark = pytest.mark.timeout(5)", ["timeout"]),
        ("settings(deadline=200)", ["deadline"]),
        ("assert resource.getrusage(0).ru_utime < 3", ["getrusage"]),
        ("def f():\n    return start.elapsed_time(end)", ["elapsed_time"]),
        ("settings(deadline=None)\nprocess.wait()\nrun(clock=lambda: 3.0)\nassert step.seconds > 0", []),
        ("importlib.import_module('flarec')\n'import time'\nSimpleNamespace(perf_counter=clock)", []),
    ],
)
def test_the_rule_about_clocks_refuses_what_it_should(source: str, names: list[str]) -> None:
    assert [name for _, name in clock_uses(source)] == names


def test_flash_linear_attention_is_absent() -> None:
    # Its presence alone breaks the eager forward of several transformers models where there is no GPU.
    assert importlib.util.find_spec("fla") is None


def test_results_that_texts_cite_are_here() -> None:
    """A file that .gitignore hides exists for its author only."""
    texts = [ROOT / "README.md", ROOT / "benchmarks" / "NOTES.md", *(ROOT / "docs").glob("*.md")]
    cited = {name for text in texts for name in re.findall(r"benchmarks/results/[\w.-]*\w", text.read_text())}
    assert len(cited) > 5
    assert not [name for name in sorted(cited) if not (ROOT / name).is_file()]


def test_the_tests_that_security_names_are_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 15
    missing = [
        f"{path}::{name}" for path, name in named
        if not (ROOT / path).is_file() or f"\ndef {name}(" not in (ROOT / path).read_text()
    ]
    assert missing == []
