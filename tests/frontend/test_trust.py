"""Nothing of a source is executed, and nobody is asked: every command and the Python interface, every kind of file.

The files here would write a marker if they were run; stdin answers `y` to whatever is asked.
"""

from __future__ import annotations

import ast
import json
import pickle
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

import flarec
from flarec.api import Model
from flarec.checkpoint.directory import open_checkpoint
from flarec.cli import COMMANDS, main
from flarec.errors import FlarecError, GenerationError, UsageError
from flarec.frontend.loading import load_model
from flarec.frontend.trust import PICKLE
from flarec.train.data.chat import ChatEncoder
from flarec.train.data.files import BadRecord, read_records
from tests.models import tiny_checkpoint, tiny_tokenizer
from tests.test_repository import PACKAGE_FILES, ROOT, python_files

CLASSES = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
TOKENIZER = {"AutoTokenizer": ["evil.EvilTokenizer", None]}
EVIL = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig
class EvilConfig(Qwen3_5TextConfig): model_type = "evil"
class EvilModel(Qwen3_5ForCausalLM): config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast): pass
def generate(*args, **kwargs): pass
"""


class Evil:
    """A pickle that writes the marker when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("plain"), "qwen3_5_text")


@pytest.fixture
def place(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: `data.jsonl`, and `model`, whose classes transformers knows, with code beside them."""
    monkeypatch.chdir(tmp_path)
    model, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(plain, model)
    edit(model / "config.json", auto_map=CLASSES)
    edit(model / "tokenizer_config.json", auto_map=TOKENIZER)
    edit(model / "generation_config.json", custom_generate="model")
    (model / "custom_generate").mkdir()
    for name in ("evil.py", "custom_generate/generate.py", "model.py", "handler.py"):
        (model / name).write_text(EVIL.format(marker=str(marker)))
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (model / name).write_bytes(pickle.dumps(Evil(marker)))
    (tmp_path / "data.jsonl").write_text('{"prompt": "red", "response": "green"}\n' * 4)
    return tmp_path


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []

    def answer(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    return asked


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def unknown_family(place: Path) -> None:
    edit(place / "model" / "config.json", model_type="evil", architectures=["EvilModel"])


def unknown_model_class(place: Path) -> None:
    """A configuration that transformers knows, of something that is no causal language model there."""
    edit(place / "model" / "config.json", model_type="vit", architectures=["EvilModel"])


def unknown_tokenizer(place: Path) -> None:
    edit(place / "model" / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    edit(place / "model" / "config.json", model_type="vit")


def elsewhere(place: Path) -> None:
    """The code of another repository."""
    unknown_family(place)
    edit(place / "model" / "config.json", auto_map={name: f"owner/name--{cls}" for name, cls in CLASSES.items()})


def fetched_attention(place: Path) -> None:
    edit(place / "model" / "config.json", attn_implementation="owner/name")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments], input="y\n" * 9)


DATA = ["--data", "data.jsonl"]
ON_A_SOURCE = {
    "convert": ["convert", "model", *DATA, "--out", "out", "--max-length", "64"],
    "answers": ["answers", "model", "--prompts", "data.jsonl", "--out", "answers.jsonl"],
    "inspect": ["inspect", "model"],
    "doctor": ["doctor", "model", "--quick"],
    "doctor of a file": ["doctor", "model/config.json", "--quick"],
    "generate": ["generate", "model", "red"],
    "chat": ["chat", "model"],
    "eval": ["eval", "model", *DATA],
    "verify": ["verify", "model"],
    "serve": ["serve", "model"],
    "tune": ["tune", "model", *DATA],
    "screen": ["screen", "model", "--mix", "a=data.jsonl", "--mix", "b=data.jsonl", "--max-length", "64"],
}
NO_SOURCE = {"recipes", "families", "bench", "passes", "finish", "lm-eval", "train-head", "report"}
"""`finish` opens the source of a run that `convert` began, `lm-eval` what its own arguments name, `train-head`
and `report` checkpoints of flarec."""
API: dict[str, Callable[[], Any]] = {
    "convert": lambda: flarec.convert("model", "data.jsonl", out="out", max_length=64),
    "load": lambda: flarec.load("model"),
    "capture": lambda: flarec.capture("model"),
    "capture without weights": lambda: flarec.capture("model", device="meta"),
}
SENTENCES: dict[Callable[[Path], None], str] = {
    unknown_family: "'evil' is not known to transformers .*custom code that a source brings is not run",
    unknown_model_class: "its model class is not known to transformers .*custom code that a source brings is not run",
    elsewhere: "'evil' is not known to transformers .*custom code that a source brings is not run",
    fetched_attention: "attn_implementation = 'owner/name' in config.json names code of a repository, which is never",
}


def test_every_command_is_here() -> None:
    assert {words[0] for words in ON_A_SOURCE.values()} | NO_SOURCE == set(COMMANDS)


@pytest.mark.parametrize("change", SENTENCES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ON_A_SOURCE)
def test_a_command_refuses_what_only_code_could_open(
    place: Path, name: str, change: Callable[[Path], None], nobody_is_asked: list[str]
) -> None:
    change(place)
    before = sorted(place.rglob("*"))
    result = run(*ON_A_SOURCE[name])
    assert nobody_is_asked == []
    assert sorted(place.rglob("*")) == before, "no marker, nothing half-written"
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), result.output
    lines = [line for line in result.output.splitlines() if line.startswith(("Error: ", "converts"))]
    assert len(lines) == 1
    assert re.search(SENTENCES[change], lines[0])


@pytest.mark.parametrize("change", SENTENCES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", API)
def test_the_interface_refuses_it_too(
    place: Path, name: str, change: Callable[[Path], None], nobody_is_asked: list[str]
) -> None:
    change(place)
    before = sorted(place.rglob("*"))
    with pytest.raises(UsageError, match=SENTENCES[change]) as caught:
        API[name]()
    assert "\n" not in str(caught.value)
    assert nobody_is_asked == []
    assert sorted(place.rglob("*")) == before


def test_a_tokenizer_of_the_sources_own(place: Path, nobody_is_asked: list[str]) -> None:
    """Where transformers has no class for it, and where it has one."""
    opened = open_checkpoint("model").load_tokenizer()
    assert type(opened).__module__.startswith("transformers.")
    unknown_tokenizer(place)
    with pytest.raises(UsageError, match=r"its tokenizer class is not known to transformers .* is not run"):
        open_checkpoint("model").load_tokenizer()
    assert nobody_is_asked == [] and not (place / "marker").exists()


def test_what_transformers_knows_is_opened_without_the_code_beside_it(place: Path, nobody_is_asked: list[str]) -> None:
    """`auto_map`, `custom_generate/`, pickles of a trainer: data that nobody reads."""
    result = run("generate", "model", "red", "--max-new-tokens", "2")
    assert result.exit_code == 0, result.output
    assert run("inspect", "model", "--after", "capture").exit_code == 0
    assert nobody_is_asked == [] and not (place / "marker").exists()


# --- weights in pickles


def pickled(place: Path, *names: str) -> None:
    """The model's weights go; a pickle with code takes their place."""
    (place / "model" / "model.safetensors").unlink()
    for name in names:
        (place / "model" / name).write_bytes(pickle.dumps(Evil(place / "marker")))


def index_of_pickles(place: Path) -> None:
    pickled(place, "evil.bin")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "evil.bin"}}
    (place / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


def named_in_the_configuration(place: Path) -> None:
    (place / "model" / "evil.bin").write_bytes(pickle.dumps(Evil(place / "marker")))
    edit(place / "model" / "config.json", transformers_weights="evil.bin")


PICKLED: dict[str, tuple[Callable[[Path], None], str]] = {
    "one file": (lambda place: pickled(place, "pytorch_model.bin"), "pytorch_model.bin"),
    "shards": (lambda place: pickled(place, "pytorch_model-00001-of-00002.bin"), "pytorch_model-00001-of-00002.bin"),
    "another name": (lambda place: pickled(place, "consolidated.00.pth"), "consolidated.00.pth"),
    "named by the safetensors index": (index_of_pickles, "evil.bin"),
    "named by the configuration": (named_in_the_configuration, "evil.bin"),
}


@pytest.mark.parametrize("name", PICKLED)
def test_pickles_are_refused_with_what_to_do(place: Path, name: str) -> None:
    change, file = PICKLED[name]
    change(place)
    before = sorted(place.rglob("*"))
    expected = f"model/{file} is a pickle file, which can hold code and is not opened; if you trust it, write its"
    for command in ("convert", "doctor", "generate", "eval", "verify"):
        result = run(*ON_A_SOURCE[command])
        assert isinstance(result.exception, SystemExit), command
        assert expected in result.output, command
        assert "python -c 'from transformers import" in result.output
    with pytest.raises(UsageError, match="is a pickle file"):
        flarec.load("model")
    assert sorted(place.rglob("*")) == before


def test_the_advice_helps(plain: Path, tmp_path: Path) -> None:
    """The command of the error, run on weights without code, gives a directory that opens with the same weights."""
    model = tmp_path / "a model"
    shutil.copytree(plain, model)
    weights = load_file(model / "model.safetensors")
    torch.save(weights, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(UsageError) as caught:
        load_model(model, None, "cpu")
    *_, command = shlex.split(str(caught.value))
    exec(command, {})
    for name, value in load_model(model, None, "cpu").state_dict().items():
        assert name not in weights or torch.equal(value, weights[name])


def test_names_of_pickles() -> None:
    for name in ("pytorch_model.bin", "model.bin", "consolidated.safetensors.pth", "pytorch_model-00001-of-00009.bin"):
        assert PICKLE.fullmatch(name)
    for name in ("training_args.bin", "model.safetensors", "tokenizer.model", "optimizer.pt"):
        assert not PICKLE.fullmatch(name)


# --- data and chat templates


def test_a_loading_script_beside_data_is_not_run(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"text": ["red", "green"]}).save_to_disk(tmp_path / "set")
    for name in ("set.py", "dataset.py"):
        (tmp_path / "set" / name).write_text(EVIL.format(marker=str(tmp_path / "marker")))
    assert [record for _, record in read_records(tmp_path / "set")] == [{"text": "red"}, {"text": "green"}]
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text(EVIL.format(marker=str(tmp_path / "marker")))
    with pytest.raises(FlarecError, match="not a directory written by `datasets`"):
        list(read_records(tmp_path / "script"))
    assert not (tmp_path / "marker").exists()


TEMPLATES = [
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ namespace.__init__.__globals__['__builtins__']['open']('MARKER', 'w') }}",
    "{% set x = messages.append(1) %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_are_sandboxed(template: str, tmp_path: Path) -> None:
    """In training and in decoding."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template.replace("MARKER", str(tmp_path / "marker"))
    messages = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "green"}]
    with pytest.raises(BadRecord):
        ChatEncoder(tokenizer, [2]).encode(messages, None)
    model = Model.__new__(Model)
    model.tokenizer = tokenizer
    with pytest.raises(GenerationError, match=r"the chat template rejects the messages \(.*unsafe"):
        model.encode(messages)
    assert not (tmp_path / "marker").exists()


# --- the rule in our own code

OPENING = {"from_pretrained", "from_config", "get_config_dict"}
RUNNING = {"get_class_from_dynamic_module", "load_custom_generate", "load_dataset", "load_dataset_builder"}
BUILT_IN = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy", "jinja2.environment"}


def breaches(source: str, *, packaged: bool = True) -> list[int]:
    """Lines that could run a file of a source: transformers opened without saying no, unpickling, `eval`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            trusted = given.get("trust_remote_code")
            says_no = isinstance(trusted, ast.Constant) and trusted.value is False
            bad = (name in OPENING or trusted is not None) and not says_no
            if packaged:
                owner = node.func.value if isinstance(node.func, ast.Attribute) else None
                bad |= name in RUNNING or (isinstance(node.func, ast.Name) and name in BUILT_IN)
                whole = f"{owner.id}.{name}" if isinstance(owner, ast.Name) else ""
                bad |= whole in ("torch.load", "np.load", "numpy.load", "jinja2.Environment")
            if bad:
                found.append(node.lineno)
        if packaged and isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if any(name in MODULES for name in names) or any(alias.name == "Environment" for alias in node.names):
                found.append(node.lineno)
    return found


def test_everything_is_opened_without_code() -> None:
    others = python_files("examples", "benchmarks", "tools")
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in (*PACKAGE_FILES, *others)
        for line in breaches(path.read_text(), packaged=path in PACKAGE_FILES)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "Auto.from_pretrained(path)", "Auto.from_pretrained(path, **options)", "Auto.from_config(config)",
        "AutoModel.from_pretrained(path, trust_remote_code=None)", "x.from_pretrained(path, trust_remote_code=trust)",
        "model.generate(ids, custom_generate=path, trust_remote_code=True)", "torch.load(path)", "import pickle",
        "from jinja2 import Environment", "eval(text)", "get_class_from_dynamic_module(a, b)", "np.load(path)",
    ],
)
def test_the_rule_finds_what_it_should(line: str) -> None:
    assert breaches(line) == [1]
    assert breaches("AutoModel.from_pretrained(path, trust_remote_code=False)\nmodel.eval()\nre.compile('')") == []
