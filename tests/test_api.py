"""`flarec.load(path).generate`: against transformers, between modes, and what it says to bad requests."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import flarec
from flarec.api import Model, load
from flarec.base.generation import GenerationOptions
from flarec.checkpoint.directory import Checkpoint, open_checkpoint
from flarec.checkpoint.manifest import MaskToken
from flarec.checkpoint.write import write_checkpoint
from flarec.errors import CheckpointError, GenerationError, UsageError
from tests.checkpoints import MASK_ROW, converted, manifest_for, mask_vector
from tests.models import END_ID, FAMILIES, VOCABULARY, tiny_checkpoint, tiny_config

PROMPTS = ["What is 12 + 30?", "x", "The sky is blue because"]
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "seed": 11}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@functools.cache
def _load(directory: Path, family: str, kind: str) -> Model:
    source, out = converted(directory / family / kind, family, kind if kind != "source" else "row")
    return load(source if kind == "source" else out)


def loaded(directory: Path, family: str, kind: str = "row") -> Model:
    """One model per family and kind of mask token: capturing costs a second or two."""
    return _load(directory, family, kind)


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return loaded(directory, "bamba")


@pytest.fixture(scope="module")
def source(directory: Path) -> Model:
    return loaded(directory, "bamba", "source")


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_is_what_transformers_generates(family: str, directory: Path) -> None:
    ours = loaded(directory, family)
    assert ours.manifest is not None
    theirs = AutoModelForCausalLM.from_pretrained(directory / family / "row" / f"{family}-row", dtype=torch.float32)
    for prompt in PROMPTS:
        ids = torch.tensor([ours.encode(prompt)])
        expected = theirs.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
        output = ours.generate(prompt, mode="causal", max_new_tokens=24)
        assert output.token_ids == expected
        assert output.new_tokens == output.forwards == len(expected)
        assert output.text == ours.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(("family", "kind"), [*((family, "row") for family in FAMILIES), ("bamba", "vector")])
def test_ar_trust_returns_the_causal_text(family: str, kind: str, directory: Path) -> None:
    ours = loaded(directory, family, kind)
    for options in ({}, SAMPLED):
        causal = ours.generate(PROMPTS, mode="causal", max_new_tokens=30, **options)
        for drafts in ("branches", "single"):
            trusted = ours.generate(PROMPTS, mode="ar-trust", drafts=drafts, max_new_tokens=30, **options)
            assert [o.token_ids for o in trusted] == [o.token_ids for o in causal]
            assert [o.text for o in trusted] == [o.text for o in causal]
            assert [o.stop_reason for o in trusted] == [o.stop_reason for o in causal]
            assert all(o.tokens_per_forward == o.new_tokens / o.forwards for o in trusted)


def test_a_list_is_one_batch_in_order(model: Model) -> None:
    for mode in ("causal", "ar-trust", "diffusion-trust"):
        together = model.generate(PROMPTS, mode=mode, max_new_tokens=12, **SAMPLED)
        alone = [model.generate(prompt, mode=mode, max_new_tokens=12, **SAMPLED) for prompt in PROMPTS]
        assert [o.token_ids for o in together] == [o.token_ids for o in alone]
        assert {o.mode for o in together} == {mode}
    assert model.generate([], max_new_tokens=4) == []


@pytest.mark.parametrize("mode", ["causal", "ar-trust", "diffusion-trust"])
def test_the_mask_token_is_never_generated(mode: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = loaded(directory, "kimi_linear")
    with torch.no_grad():
        head = ours.hf_model.get_output_embeddings().weight
        kept = head.clone()
        head.mul_(0.01)
        head[MASK_ROW] = kept[MASK_ROW] * 50  # for about half of all rows by far the best choice
    try:
        ids = [t for o in ours.generate(PROMPTS, mode=mode, max_new_tokens=16) for t in o.token_ids]
        assert MASK_ROW not in ids
        monkeypatch.setattr(ours.engine, "suppress", ())
        ids = [t for o in ours.generate(PROMPTS, mode=mode, max_new_tokens=16) for t in o.token_ids]
        assert MASK_ROW in ids
    finally:
        with torch.no_grad():
            head.copy_(kept)


def test_streamed_pieces_join_to_the_text(model: Model) -> None:
    pieces: dict[int, list[str]] = {0: [], 1: [], 2: []}
    outputs = model.generate(PROMPTS, max_new_tokens=40, on_text=lambda i, text: pieces[i].append(text), **SAMPLED)
    assert ["".join(pieces[i]) for i in range(3)] == [output.text for output in outputs]
    assert max(len(parts) for parts in pieces.values()) > 3


@pytest.mark.parametrize("mode", ["causal", "ar-trust", "diffusion-trust"])
def test_stop_strings(mode: str, model: Model) -> None:
    free = model.generate(PROMPTS[0], mode=mode, max_new_tokens=40, **SAMPLED)
    stop = free.text[12:14]
    pieces: list[str] = []
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": 40, **SAMPLED}
    stopped = model.generate(PROMPTS[0], stop=[stop, "never"], on_text=lambda _, text: pieces.append(text), **options)
    assert stopped.stop_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)] == "".join(pieces)
    assert stopped.token_ids == free.token_ids[: stopped.new_tokens]
    assert stop in model.decode(stopped.token_ids)
    assert stop not in model.decode(stopped.token_ids[:-1])  # not a token more than needed
    assert model.generate(PROMPTS[0], stop=stop, **options).text == stopped.text


def test_eos_ends_the_text_and_is_not_part_of_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    free = model.generate(PROMPTS[2], max_new_tokens=20)
    monkeypatch.setattr(model.engine, "eos_ids", frozenset([free.token_ids[7]]))
    ended = model.generate(PROMPTS[2], max_new_tokens=20)
    cut = free.token_ids.index(free.token_ids[7]) + 1
    assert (ended.token_ids, ended.stop_reason) == (free.token_ids[:cut], "eos")


def test_eos_ids_come_from_both_configurations_and_the_tokenizer(model: Model, tmp_path: Path) -> None:
    assert model.eos_ids == {END_ID}
    checkpoint = Checkpoint(tmp_path, None)
    config = tiny_config("bamba", eos_token_id=9)
    assert checkpoint.eos_ids(config, None) == {9}, "without a generation config"
    GenerationConfig(eos_token_id=[7, 8]).save_pretrained(tmp_path)
    assert checkpoint.eos_ids(config, model.tokenizer) == {7, 8, END_ID}
    GenerationConfig(eos_token_id=7).save_pretrained(tmp_path)
    assert checkpoint.eos_ids(config, None) == {7}
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read"):
        checkpoint.eos_ids(config, None)


def test_chat_goes_through_the_template(model: Model) -> None:
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    expected = model.tokenizer(text)["input_ids"]
    assert model.encode("hello", chat=True) == expected
    assert model.encode([{"role": "user", "content": "hello"}]) == expected
    assert model.encode("hello") == model.tokenizer("hello")["input_ids"] != expected
    conversation = [{"role": "user", "content": "hello"}]
    one = model.generate(conversation, max_new_tokens=6)
    two = model.generate([conversation, conversation], max_new_tokens=6)
    assert one.token_ids == two[0].token_ids == model.generate("hello", chat=True, max_new_tokens=6).token_ids


def test_an_empty_prompt_starts_from_bos(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GenerationError, match="prompt 0 is empty"):
        model.generate("")
    with_bos = copy.deepcopy(model.tokenizer)
    with_bos.bos_token = "<|im_start|>"
    monkeypatch.setattr(model, "tokenizer", with_bos)
    assert model.encode("") == [1]


def test_the_checkpoints_defaults_are_used(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[GenerationOptions] = []
    real = model.engine.generate

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[1][0])
        return real(*args, **kwargs)

    monkeypatch.setattr(model.engine, "generate", spy)
    assert model.manifest is not None
    decode = replace(model.manifest.decode, confidence_threshold=0.3, denoising_steps=2, drafts="single")
    monkeypatch.setattr(model, "manifest", replace(model.manifest, decode=decode))
    model.generate("a", max_new_tokens=2)
    model.generate("a", max_new_tokens=2, mode="causal", threshold=0.5, denoising_steps=1, drafts="branches")
    chosen = [(item.mode, item.threshold, item.denoising_steps, item.drafts) for item in seen]
    assert chosen == [("ar-trust", 0.3, 2, "single"), ("causal", 0.5, 1, "branches")]


def test_a_low_threshold_needs_fewer_forwards(model: Model) -> None:
    counts = [model.generate("a", mode="diffusion-trust", max_new_tokens=24, threshold=t).forwards for t in (0.0, 1.0)]
    assert counts[0] < counts[1]


def test_a_source_model_decodes_causally(source: Model) -> None:
    assert not source.converted
    assert source.generate("abc", max_new_tokens=5).mode == "causal"
    for mode in ("ar-trust", "diffusion-trust"):
        with pytest.raises(GenerationError, match=r"not converted.*run `flarec convert`"):
            source.generate("abc", mode=mode)


def test_parameters_are_shared_with_the_transformers_model(source: Model) -> None:
    theirs = dict(source.hf_model.named_parameters())
    assert source.decode_program.parameters().keys() == theirs.keys()
    assert all(parameter is theirs[name] for name, parameter in source.decode_program.parameters().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "backwards"}, "unknown mode"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"seed": 10**400}, "seed is an integer of 1329 bits"),
        ({"temperature": 1e38}, "temperature is 1e.38; give a number, at least 0, at most 1000000"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"suppress": [VOCABULARY]}, "outside the vocabulary"),
        ({"eos_ids": [1.5]}, "a token id of eos_ids is 1.5"),
        ({"stop": 3}, "stop holds 3"),
        ({"threshold": 1.5}, "threshold"),
        ({"drafts": "many"}, "unknown drafts"),
        ({"stop": [""]}, "stop strings must not be empty"),
    ],
)
def test_bad_requests(model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        model.generate("abc", **options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "the prompt is None; give text"),
        (b"abc", "the prompt is b'abc'; give text"),
        ({"role": "user", "content": "x"}, "the prompt is {'role'"),
        ([1, 2], r"a prompt is 1; give text or a list of messages \(token ids are for generate_ids\)"),
        ([["x"]], r"a prompt is \['x'\]"),
    ],
)
def test_what_is_no_prompt(model: Model, prompt: Any, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        model.generate(prompt)


def test_none_numpy_and_tensors_are_what_they_say(model: Model) -> None:
    expected = model.generate_ids([model.encode("abc")], mode="ar-trust", max_new_tokens=6, temperature=0.5, seed=4)[0]
    ids = torch.tensor([model.encode("abc")])
    nothing = dict.fromkeys(
        ["mode", "top_k", "top_p", "threshold", "denoising_steps", "drafts", "stop", "eos_ids", "suppress"]
    )
    numbers: dict[str, Any] = {
        "max_new_tokens": np.int64(6), "temperature": torch.tensor(0.5), "seed": np.array([4])
    }
    same = model.generate_ids(ids, **nothing, **numbers)[0]
    assert {**same.to_dict(), "seconds": 0} == {**expected.to_dict(), "seconds": 0}


def test_options_as_an_object_and_per_prompt(model: Model) -> None:
    hot = GenerationOptions(temperature=1.0, seed=3, max_new_tokens=9)
    alone = [model.generate(prompt, hot, seed=seed) for prompt, seed in zip(PROMPTS, (3, 4, 5), strict=True)]
    each = [replace(hot, seed=seed) for seed in (3, 4, 5)]
    assert [o.token_ids for o in model.generate(PROMPTS, each)] == [o.token_ids for o in alone]
    stop = alone[1].text[2:4]
    each[1] = replace(each[1], stop=(stop,))
    pieces = ["", "", ""]

    def show(index: int, text: str) -> None:
        pieces[index] += text

    outputs = model.generate(PROMPTS, each, on_text=show)
    assert [o.stop_reason for o in outputs] == ["length", "stop", "length"]
    assert pieces == [o.text for o in outputs]
    assert outputs[1].text == alone[1].text[: alone[1].text.index(stop)]
    with pytest.raises(GenerationError, match="3 prompts came with 2 generation options"):
        model.generate(PROMPTS, each[:2])
    with pytest.raises(TypeError, match="max_tokens"):
        model.generate("abc", max_tokens=3)  # type: ignore[call-overload]


def test_eos_and_suppressed_ids_of_a_call(model: Model) -> None:
    free = model.generate(PROMPTS[2], max_new_tokens=20)
    ended = model.generate(PROMPTS[2], max_new_tokens=20, eos_ids=free.token_ids[7])
    first = free.token_ids.index(free.token_ids[7]) + 1
    assert (ended.token_ids, ended.stop_reason) == (free.token_ids[:first], "eos")
    without = model.generate(PROMPTS[2], max_new_tokens=20, suppress=free.token_ids[:3]).token_ids
    assert not {*free.token_ids[:3], MASK_ROW} & set(without)
    assert model.generate(PROMPTS[2], max_new_tokens=20).token_ids == free.token_ids


def test_a_prompt_longer_than_the_context(model: Model) -> None:
    with pytest.raises(GenerationError, match="no room for new ones in a context of 1024"):
        model.generate("€" * 400)


def test_a_prompt_that_is_not_unicode(model: Model) -> None:
    with pytest.raises(GenerationError, match="not UTF-8"):
        model.generate("a\udcff")


def test_no_chat_template(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    with pytest.raises(GenerationError, match="no chat template"):
        model.generate("abc", chat=True)


def test_messages_that_the_template_rejects(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(GenerationError, match=r"the chat template rejects the messages .roles must alternate"):
        model.generate("abc", chat=True)


def test_a_missing_mask_vector(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path, "bamba")
    opened = open_checkpoint(source)
    manifest = manifest_for(source, "vector")
    out = write_checkpoint(tmp_path / "out", opened.load_model(), opened.load_tokenizer(), manifest)
    with pytest.raises(CheckpointError, match="no mask vector"):
        load(out)


def test_the_mask_vector_of_the_checkpoint_is_used(directory: Path) -> None:
    ours = loaded(directory, "bamba", "vector")
    assert ours.manifest is not None and ours.manifest.mask == MaskToken("vector", VOCABULARY)
    (name, parameter), = ours.decode_program.extra.items()
    assert torch.equal(parameter, mask_vector()[name])
    before = ours.generate("abc", mode="diffusion-trust", max_new_tokens=12)
    with torch.no_grad():
        parameter.mul_(-3)
    try:
        assert ours.generate("abc", mode="diffusion-trust", max_new_tokens=12).token_ids != before.token_ids
    finally:
        with torch.no_grad():
            parameter.div_(-3)


def test_the_cpu_computes_in_float32_whatever_is_stored(tmp_path: Path) -> None:
    _, out = converted(tmp_path, "bamba", dtype=torch.bfloat16)
    assert load(out).program.dtype == torch.float32
    assert load(out, dtype="bfloat16").program.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"dtype": "nothing"}, "dtype 'nothing' is unknown"),
        ({"device": "toaster"}, "device 'toaster' cannot be used"),
        ({"kernels": "magic"}, "unknown kernels 'magic'"),
        ({"block_size": "4", "mask_token_id": 3}, "block_size is '4'; give a whole number"),
        ({"block_size": 4, "mask_token_id": True}, "mask_token_id is True"),
        ({"block_size": 10**400, "mask_token_id": 3}, "block_size is an integer of 1329 bits"),
    ],
)
def test_bad_arguments_of_load(directory: Path, options: dict[str, Any], message: str) -> None:
    path = directory / "arguments"
    if not path.exists():
        tiny_checkpoint(path, "bamba")
    with pytest.raises(UsageError, match=message):
        load(path / "bamba", **options)


def test_lazy_exports() -> None:
    assert flarec.load is load
    with pytest.raises(AttributeError, match="no attribute 'unload'"):
        _ = flarec.unload
