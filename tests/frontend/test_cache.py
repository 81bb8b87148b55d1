"""The program cache: a restored program is the fresh one, and a file that is not just right is as good as none."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import flarec as package
from flarec.decode import Engine
from flarec.frontend import cache as program_cache
from flarec.frontend.cache import Entry, cache_directory, entry_of, key_of
from flarec.frontend.export import capture, load_model
from flarec.ir.json import Unstorable, graph_from_json, graph_to_json
from flarec.ir.program import Program
from flarec.layout import Block, build_layout
from flarec.passes import lower
from tests.checkpoints import converted
from tests.models import FAMILIES, captured, shared_model, tiny_checkpoint, tiny_model

CACHED = "capture(cached=True)"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv(program_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "programs"


def restored(family: str) -> Program:
    """The shared model's program from a cache that holds its capture."""
    model = shared_model(family)
    entry = entry_of(model, family)
    assert entry is not None
    entry.store(captured(family).module, model)
    program = capture(model, cache=True)
    assert program.history[0].step == CACHED
    return program


def is_fresh(program: Program) -> bool:
    return program.history[0].step == "capture()"


def nodes(module: fx.GraphModule) -> list[tuple[Any, ...]]:
    """Everything about a graph but its tensors; node arguments by name, regions after it."""
    found: list[tuple[Any, ...]] = []
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            args, kwargs = fx.map_arg((node.args, node.kwargs), repr)
            found.append((node.op, node.name, node.target, args, kwargs, node.meta))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_restored_program_is_the_fresh_one(family: str) -> None:
    program, fresh = restored(family), captured(family)
    assert nodes(program.module) == nodes(fresh.module)
    assert (program.properties, program.dtype, program.family) == (fresh.properties, fresh.dtype, fresh.family)
    assert program.history[0].delta == fresh.history[0].delta
    assert {name: id(p) for name, p in program.parameters().items()} == {
        name: id(p) for name, p in fresh.parameters().items()
    }, "the model's own parameters, in the same order"
    assert list(program.parameters()) == list(fresh.parameters())
    assert program.module.code == fresh.module.code


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_the_same_bits(family: str) -> None:
    program, fresh = restored(family), captured(family)
    ids = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(11).expand(2, -1).contiguous()
    parameters = list(fresh.parameters().values())
    results = []
    for one in (program, fresh):
        logits = one(ids, position_ids=positions)
        results.append((logits, *torch.autograd.grad(logits.square().mean(), parameters, allow_unused=True)))
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_lowered_programs_are_the_same(family: str) -> None:
    """All properties are checked on the way, after each pass."""
    program, fresh = restored(family), captured(family)
    one, two = (lower(p, "train", mask_vector=True, debug=True) for p in (program, fresh))
    assert nodes(one.module) == nodes(two.module)
    assert one.properties == two.properties
    layout = build_layout([[8]], [[Block(0, 4, 2)]])
    ids = torch.randint(3, 300, (1, layout.length), generator=torch.Generator().manual_seed(4))
    rows = torch.arange(layout.length)
    assert torch.equal(one(ids, layout=layout, head_rows=rows), two(ids, layout=layout, head_rows=rows))

    one, two = (lower(p, "decode", debug=True) for p in (program, fresh))
    assert nodes(one.module) == nodes(two.module)
    assert [record.sites for record in one.history] == [record.sites for record in two.history]
    assert one.cache_slots == two.cache_slots
    texts = [
        Engine(p, mask_token_id=None, block_size=None, readouts={}, eos_ids=frozenset(), max_positions=64).generate(
            [[5, 9, 12]], mode="causal", max_new_tokens=6
        )[0].token_ids
        for p in (one, two)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 6


def test_only_what_asks_for_the_cache_uses_it(directory: Path) -> None:
    capture(tiny_model("bamba"))
    assert not directory.exists()


@pytest.mark.parametrize("value", ["", "off", "OFF"])
def test_it_can_be_switched_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(program_cache.VARIABLE, value)
    assert cache_directory() is None
    assert entry_of(shared_model("bamba"), "bamba") is None
    assert is_fresh(capture(shared_model("bamba"), cache=True))


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(program_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_directory() == Path("/x/flarec/programs")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_directory() == Path("/home/someone/.cache/flarec/programs")


def _damage(kind: str, content: bytes, other: bytes) -> bytes:
    return {
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "one bit": content[:-200] + bytes([content[-200] ^ 1]) + content[-199:],
        "another target": content.replace(b"aten.linear.default", b"aten.matmul.default"),
        "no text": b"\xff\xfe" + content,
        "another model's": other,
    }[kind]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Entry, bytes]]:
    """Entries of two models whose tensors have the same names and shapes, with their contents."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(program_cache.VARIABLE, str(tmp_path_factory.mktemp("stored")))
        for window in (16, 32):
            model = tiny_model("bamba", mamba_chunk_size=window, rms_norm_eps=1 / window)
            capture(model, cache=True)
            entry = entry_of(model, "bamba")
            assert entry is not None
            found[window] = entry, entry.path.read_bytes()
    return found


@pytest.mark.parametrize("kind", ["empty", "truncated", "one bit", "another target", "no text", "another model's"])
def test_a_file_that_is_not_just_right_is_no_file(kind: str, stored: dict[int, tuple[Entry, bytes]]) -> None:
    (entry, content), (_, other) = stored[16], stored[32]
    model = tiny_model("bamba", mamba_chunk_size=16, rms_norm_eps=1 / 16)
    assert entry.restore(model) is not None
    damaged = _damage(kind, content, other)
    assert damaged != content
    entry.path.write_bytes(damaged)
    assert entry.restore(model) is None
    entry.path.write_bytes(content)


FOREIGN: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "others may write it": lambda path, patch: path.chmod(0o606),
    "its group may write it": lambda path, patch: path.chmod(0o660),
    "it is somebody else's": lambda path, patch: patch.setattr(os, "getuid", lambda: path.stat().st_uid + 1),
    "it is a pipe": lambda path, patch: (path.unlink(), os.mkfifo(path)),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_others_could_have_written_is_not_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry(tmp_path / f"{'0' * 64}.json")
    entry.write({"mine": 1})
    assert entry.read() == {"mine": 1}
    FOREIGN[name](entry.path, monkeypatch)
    with pytest.raises(Unstorable, match="may be somebody else's"):
        entry.read()
    program_cache._drop_oldest(tmp_path)


def test_a_damaged_file_is_replaced(directory: Path) -> None:
    model = tiny_model("bamba")
    assert is_fresh(capture(model, cache=True))
    (path,) = directory.glob("*.json")
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    assert is_fresh(capture(model, cache=True))
    assert path.read_bytes() == content
    assert not is_fresh(capture(model, cache=True))


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _table(program: Program) -> Any:
    return graph_to_json(program.module, _tensors(program.module))


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, "call_module", "is a call_module"),
        (2, "os:system", "unknown target"),
        (2, "builtins:eval", "unknown target"),
        (2, "aten.no_such_op.default", None),
        (2, "aten._schema", "unknown target"),
        (3, {"tuple": [{"node": "nobody"}]}, None),
        (3, {"tuple": [{"dtype": "Tensor"}]}, "is no dtype"),
        (5, {"val": [["__import__('os')"], "float32"]}, "is no size"),
        (1, "linear = exit()", "is no name"),
        (4, {"dict": {"bias=exit(), x": 1}}, "is no name"),
        (2, "_operator:call", "unknown target"),
        (2, "_operator:attrgetter", "unknown target"),
        (2, "_operator:methodcaller", "unknown target"),
        (2, "math:__loader__", "unknown target"),
        (2, "torch:load", "unknown target"),
        (2, "torch:sym_int.__globals__", "unknown target"),
        (2, "aten.from_file.default", "unknown target"),
        (2, "higher_order.print", "unknown target"),
        (2, "c10d.broadcast_.default", "unknown target"),
    ],
)
def test_a_table_with_anything_else_is_refused(position: int, value: Any, words: str | None) -> None:
    program = captured("bamba")
    table = _table(program)
    call = next(node for node in table["nodes"] if node[2] == "aten.linear.default")
    call[position] = value
    with pytest.raises((Unstorable, KeyError, AttributeError), match=words):
        graph_from_json(table, _tensors(program.module))


CODE = "__import__('pathlib').Path({!r}).touch()"


@pytest.mark.parametrize("place", ["placeholder", "attribute", "region", "keyword", "text"])
def test_a_stored_graph_brings_no_code(place: str, tmp_path: Path) -> None:
    """fx makes Python code of a graph and runs it: nothing of a file gets into that as code."""
    code = CODE.format(str(tmp_path / "marker"))
    program = captured("bamba")
    table = _table(program)
    nodes = table["nodes"]
    if place == "placeholder":
        next(node for node in nodes if node[2] == "input_ids")[2] = f"input_ids={code}"
    elif place == "attribute":
        next(node for node in nodes if node[0] == "get_attr")[2] += f'", {code}, "'
    elif place == "region":
        name = f'w", {code}, "'
        end = ["output", "output", "output", {"tuple": [None]}, {"dict": {}}, {}]
        table["regions"][name] = {"nodes": [end], "regions": {}}
        next(node for node in nodes if node[0] == "get_attr")[2] = name
    elif place == "keyword":
        next(node for node in nodes if node[2] == "aten.linear.default")[4] = {"dict": {f"x={code}, y": 1}}
    else:  # a text is a text: quotes in it end nothing
        call = next(node for node in nodes if node[2] == "aten.linear.default")
        call[3] = {"tuple": [f"'+{code}+'", {"dict": {f"'+{code}+'": f'"+{code}+"'}}]}
    with pytest.raises((Unstorable, TypeError, RuntimeError, ValueError)):
        graph_from_json(table, _tensors(program.module))(torch.zeros(1, 1, dtype=torch.int64))
    assert not (tmp_path / "marker").exists()


def test_a_graph_that_does_not_fit_the_model_is_not_bound() -> None:
    program = captured("bamba")
    tensors = _tensors(program.module)
    tensors.pop("model.embed_tokens.weight")
    with pytest.raises(KeyError):
        graph_from_json(_table(program), tensors)


def test_constants_of_the_tracer_are_not_stored() -> None:
    program = captured("bamba").clone()
    program.module.register_buffer("lifted", torch.ones(1))
    with program.graph.inserting_before(program.output_node()):
        program.graph.get_attr("lifted")
    with pytest.raises(Unstorable, match="'lifted' is no tensor of the model"):
        graph_to_json(program.module, _tensors(shared_model("bamba")))


def test_a_stored_program_that_fails_its_checks_is_captured_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right file, wrong graph: a layer without a mixer."""
    model = tiny_model("llama")
    capture(model, cache=True)
    wrong = captured("llama").clone()
    for node in wrong.calls(torch.ops.flarec.softmax_attention.default):
        node.replace_all_uses_with(node.kwargs["q"])  # type: ignore[arg-type]
        wrong.graph.erase_node(node)
    wrong.finish()
    monkeypatch.setattr(Entry, "restore", lambda self, model: wrong.module)
    assert is_fresh(capture(model, cache=True))


def test_what_decides_a_capture_decides_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    base = key_of(tiny_model("bamba"), "bamba")
    assert base is not None
    assert key_of(tiny_model("bamba", seed=1), "bamba") == base, "weights do not"
    keys = {base, key_of(tiny_model("qwen3_5_text"), "qwen3_5_text")}
    keys.add(key_of(tiny_model("bamba", rms_norm_eps=1e-3), "bamba"))
    keys.add(key_of(tiny_model("bamba").to(torch.bfloat16), "bamba"))
    model = tiny_model("bamba")
    model.model.layers[1].self_attn.scaling *= 2  # an attribute that tracing bakes into the graph
    keys.add(key_of(model, "bamba"))
    model = tiny_model("bamba")
    model.model.final_layernorm.weight = nn.Parameter(model.model.final_layernorm.weight.double())
    keys.add(key_of(model, "bamba"))
    versions = program_cache.versions()
    for name in versions:
        monkeypatch.setattr(program_cache, "versions", lambda name=name: versions | {name: "another"})
        keys.add(key_of(tiny_model("bamba"), "bamba"))
    monkeypatch.setattr(program_cache, "versions", lambda: versions)
    monkeypatch.setattr(program_cache, "source_of", lambda module: f"{module} changed")
    keys.add(key_of(tiny_model("bamba"), "bamba"))
    assert len(keys) == 7 + len(versions)
    assert None not in keys


def test_what_a_conversion_states_does_not(tmp_path: Path) -> None:
    """A checkpoint finds the graph of its source; a setting of the model under the same name still decides."""
    own = key_of(tiny_model("lfm2"), "lfm2")
    for path in converted(tmp_path, "lfm2"):
        assert key_of(load_model(path, torch.float32, "cpu"), "lfm2") == own
    assert len({key_of(tiny_model("minimax", block_size=size), "minimax") for size in (16, 32)}) == 2


def test_the_versions_name_what_they_should() -> None:
    own = {"flarec/frontend", "flarec/ir", "flarec/ops"}
    assert {"python", "torch", "transformers", "flarec"} | own <= set(program_cache.versions())


def test_the_hash_of_a_folder_covers_names_and_contents(tmp_path: Path) -> None:
    def made(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            (tmp_path / name / "own" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "own" / file).write_text(text)
        return program_cache._sources_sha256(tmp_path / name / "own")

    first = made("a", {"x.py": "1", "deep/y.py": "2"})
    assert first == made("b", {"deep/y.py": "2", "x.py": "1", "notes.txt": "no source"})
    assert len({first, made("c", {"x.py": "1", "deep/y.py": "3"}), made("d", {"x.py": "1", "deep/z.py": "2"})}) == 3


def test_models_with_code_of_their_own_are_not_cached(directory: Path) -> None:
    class Norm(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    changes = {
        "module": lambda m: setattr(m.model, "final_layernorm", Norm()),
        "forward": lambda m: setattr(m.lm_head, "forward", lambda x: x),
        "function": lambda m: setattr(m.lm_head, "extra", lambda x: x),
        "hook": lambda m: m.lm_head.register_forward_hook(lambda *args: None),
    }
    for name, change in changes.items():
        model = tiny_model("bamba")
        change(model)
        assert key_of(model, "bamba") is None, name


def test_where_nothing_can_be_written(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(program_cache.VARIABLE, str(tmp_path / "file"))
    for _ in range(2):
        assert is_fresh(capture(tiny_model("llama"), cache=True))


def test_writers_beside_each_other(directory: Path) -> None:
    """Readers find nothing or the whole graph, and no temporary file stays."""
    program, model = captured("bamba"), shared_model("bamba")
    entry = entry_of(model, "bamba")
    assert entry is not None
    results: list[bool] = []
    errors: list[BaseException] = []

    def write() -> None:
        try:
            for _ in range(8):
                entry.store(program.module, model)
                results.append(entry.restore(model) is not None)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert results == [True] * 32
    assert list(directory.iterdir()) == [entry.path]


def test_the_oldest_graphs_go(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_cache, "KEPT", 3)
    program, model = captured("bamba"), shared_model("bamba")
    for number in range(5):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"note {number}.json").write_text("mine")
        (directory / f"{number + 8:064x}.json").write_text("mine")
        Entry(directory / f"{number:064x}.json").store(program.module, model)
    graphs = [path for path in directory.iterdir() if path.read_text() != "mine"]
    assert len(graphs) == 3
    assert (directory / f"{4:064x}.json") in graphs
    assert len(list(directory.iterdir())) == 3 + 10, "what the cache did not write stays"


SECOND_RUN = """
import sys
import flarec
model = flarec.load(sys.argv[1])
print(model.program.history[0].step, "torch.export._trace" in sys.modules, model.generate("hi", max_new_tokens=4).text)
"""


def test_a_second_process_does_not_trace(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "llama")
    first = package.load(path)
    assert is_fresh(first.program)
    done = subprocess.run([sys.executable, "-c", SECOND_RUN, str(path)], capture_output=True, text=True, check=True)
    step, _, text = done.stdout.split(" ", 2)
    assert (step, text.removesuffix("\n")) == (CACHED, first.generate("hi", max_new_tokens=4).text)
