"""`model.generate(..., custom_generate=DIR)`: the decode modes as transformers reaches them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, set_seed
from transformers.generation.streamers import BaseStreamer

from flarec import api, hf_generate
from flarec.errors import GenerationError
from tests.checkpoints import MASK_ROW, converted

IDS = torch.tensor([[40, 51, 62, 73, 84, 95]])


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers copies custom code into a cache: not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(converted(tmp_path_factory.mktemp("generate"), "bamba")[1])


@pytest.fixture(scope="module")
def model(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.fixture
def custom(path: str) -> dict[str, Any]:
    return {"custom_generate": path, "trust_remote_code": True}


@pytest.mark.parametrize("mode", ["causal", "ar-trust"])
def test_greedy_is_what_transformers_generates(mode: str, model: Any, custom: dict[str, Any]) -> None:
    expected = model.generate(IDS, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=20, do_sample=False, mode=mode, **custom), expected)
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=20, mode=mode, **custom), expected)
    config = GenerationConfig(max_new_tokens=20, do_sample=False, suppress_tokens=[MASK_ROW])
    assert torch.equal(model.generate(IDS, config, mode=mode, **custom), expected)
    assert torch.equal(model.generate(IDS, max_length=26, mode=mode, **custom), expected)


def test_diffusion_trust_is_the_apis(model: Any, path: str, custom: dict[str, Any]) -> None:
    from flarec.api import load

    expected = load(path).generate_ids(IDS.tolist(), mode="diffusion-trust", max_new_tokens=9)[0].token_ids
    result = model.generate(IDS, max_new_tokens=9, mode="diffusion-trust", **custom)
    assert result[0, IDS.shape[1] :].tolist() == expected


def test_trusting_the_code_at_load_makes_it_the_default(path: str, model: Any) -> None:
    bound = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    expected = model.generate(IDS, max_new_tokens=12, do_sample=False)
    assert torch.equal(bound.generate(IDS, max_new_tokens=12), expected)
    assert torch.equal(bound.generate(inputs=IDS, max_new_tokens=12, mode="causal"), expected)


def test_sampling_follows_the_seed(model: Any, custom: dict[str, Any]) -> None:
    options = {"max_new_tokens": 20, "do_sample": True, "temperature": 1.0, "top_k": 50, **custom}
    modes = [model.generate(IDS, seed=3, mode=mode, **options) for mode in ("causal", "ar-trust")]
    assert torch.equal(*modes)
    set_seed(1)
    first = model.generate(IDS, **options)
    assert not torch.equal(model.generate(IDS, **options), first)  # the generator has moved on
    set_seed(1)
    assert torch.equal(model.generate(IDS, **options), first)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(side: str, model: Any, custom: dict[str, Any]) -> None:
    short = IDS[:, :4]
    padding = torch.zeros(1, 2, dtype=torch.int64)
    parts = [padding, short] if side == "left" else [short, padding]
    batch = torch.cat([IDS, torch.cat(parts, dim=1)])
    mask = torch.ones_like(batch)
    mask[1, slice(0, 2) if side == "left" else slice(4, 6)] = 0
    result = model.generate(batch, attention_mask=mask, max_new_tokens=8, **custom)
    assert torch.equal(result[:, :6], batch)
    alone = [model.generate(row, max_new_tokens=8, **custom)[0, row.shape[1] :] for row in (IDS, short)]
    for row, expected in zip(result, alone, strict=True):
        assert torch.equal(row[6 : 6 + len(expected)], expected)
        assert (row[6 + len(expected) :] == model.generation_config.pad_token_id).all()


def test_eos_of_the_call_is_honoured(model: Any, custom: dict[str, Any]) -> None:
    free = model.generate(IDS, max_new_tokens=12, **custom)[0, 6:]
    ended = model.generate(IDS, max_new_tokens=12, eos_token_id=int(free[4]), **custom)[0, 6:]
    assert ended.tolist() == free[: free.tolist().index(int(free[4])) + 1].tolist()
    assert torch.equal(model.generate(IDS, max_new_tokens=12, **custom)[0, 6:], free)


def test_suppressed_tokens_of_the_call_are_honoured(model: Any, custom: dict[str, Any]) -> None:
    free = model.generate(IDS, max_new_tokens=12, **custom)[0, 6:]
    result = model.generate(IDS, max_new_tokens=12, suppress_tokens=[int(free[0])], **custom)[0, 6:]
    assert int(free[0]) not in result.tolist()


# --- threads that share one model


class Turns:
    """Two threads that take turns at every yield point, so that each runs between any two steps of the other."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.turn = 0
        self.running = {0, 1}
        self.switches = 0
        self.mine = threading.local()

    def switch(self) -> None:
        """Let the other thread run, if it still does, until it comes to a yield point or to its end."""
        number = getattr(self.mine, "number", None)
        if number is None:
            return
        with self.changed:
            if 1 - number in self.running:
                self.turn, self.switches = 1 - number, self.switches + 1
                self.changed.notify_all()
                assert self.changed.wait_for(lambda: self.turn == number)

    def run(self, *tasks: Callable[[], Any]) -> list[Any]:
        def work(number: int, task: Callable[[], Any]) -> Any:
            self.mine.number = number
            with self.changed:
                assert self.changed.wait_for(lambda: self.turn == number)
            try:
                return task()
            finally:
                with self.changed:
                    self.running.discard(number)
                    self.turn = 1 - number
                    self.changed.notify_all()

        with ThreadPoolExecutor(2) as pool:
            return [future.result() for future in [pool.submit(work, *pair) for pair in enumerate(tasks)]]


def yielding(turns: Turns, function: Callable[..., Any]) -> Callable[..., Any]:
    def around(*args: Any, **kwargs: Any) -> Any:
        turns.switch()
        result = function(*args, **kwargs)
        turns.switch()
        return result

    return around


def test_threads_with_different_settings(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets what it gets alone: EOS, suppressed ids, noise and mode are of the call, not of the model."""
    model = AutoModelForCausalLM.from_pretrained(path)
    free = hf_generate.generate(model, IDS, max_new_tokens=12, mode="causal")[0, 6:].tolist()
    cases: list[dict[str, Any]] = [
        {"mode": "causal", "eos_token_id": free[5]},
        {"mode": "ar-trust", "suppress_tokens": free[:2], "do_sample": True, "temperature": 0.9, "seed": 1},
        {"mode": "diffusion-trust", "threshold": 0.2, "suppress_tokens": [free[3]]},
        {"mode": "ar-trust", "eos_token_id": [free[2], free[4]], "drafts": "single", "stop_strings": "never"},
    ]

    def task(case: dict[str, Any]) -> Callable[[], list[int]]:
        return lambda: hf_generate.generate(model, IDS, max_new_tokens=12, **case)[0, 6:].tolist()

    alone = [task(case)() for case in cases]
    assert len({tuple(tokens) for tokens in alone}) == len(cases), "settings that matter"
    runner = model.__dict__[hf_generate._CACHED][0]
    for one, two in itertools.combinations(range(len(cases)), 2):
        turns = Turns()
        with monkeypatch.context() as patch:
            patch.setattr(runner, "generate_ids", yielding(turns, runner.generate_ids))
            patch.setattr(runner.engine, "generate", yielding(turns, runner.engine.generate))
            patch.setattr(runner.decode_program, "step", yielding(turns, runner.decode_program.step))
            assert turns.run(task(cases[one]), task(cases[two])) == [alone[one], alone[two]], (one, two)
        assert turns.switches > 10


def test_two_first_calls_prepare_the_model_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(path)
    prepared: list[int] = []
    original, lock = api.Model, threading.Lock()
    second_waits = threading.Event()

    class Watched:
        """The lock; says when a second call has come to it."""

        def __enter__(self) -> None:
            if not lock.acquire(blocking=False):
                second_waits.set()
                lock.acquire()

        def __exit__(self, *error: object) -> None:
            lock.release()

    def slow(*args: Any, **kwargs: Any) -> Any:
        prepared.append(threading.get_ident())
        assert len(prepared) == 1, "the second call prepares the model too"
        second_waits.wait()
        return original(*args, **kwargs)

    monkeypatch.setattr(hf_generate, "_PREPARING", Watched())
    monkeypatch.setattr(hf_generate, "Model", slow)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(hf_generate.generate, model, IDS, max_new_tokens=4) for _ in range(2)]
        one, other = (call.result() for call in calls)
    assert torch.equal(one, other) and len(prepared) == 1


def test_changed_weights_are_used(path: str, custom: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16):  # shared parameters, and a float32 copy
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        before = model.generate(IDS, max_new_tokens=8, **custom)
        with torch.no_grad():
            model.get_output_embeddings().weight.neg_()
        assert not torch.equal(model.generate(IDS, max_new_tokens=8, **custom), before)
        assert model.dtype == dtype


def test_streamer_and_returned_object(model: Any, custom: dict[str, Any]) -> None:
    class Streamer(BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.reshape(-1).tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    result = model.generate(IDS, max_new_tokens=9, streamer=streamer, return_dict_in_generate=True, **custom)
    assert streamer.seen == result.sequences[0].tolist()
    assert streamer.ended


class _Processor:
    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"min_new_tokens": 4}, "min_new_tokens"),
        ({"logits_processor": [_Processor()]}, "logits_processor"),
        ({"nonsense": 1}, "unknown arguments for generate: nonsense"),
        ({"max_new_tokens": None, "max_length": 6}, "max_length = 6"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask has shape"),
        ({"mode": "backwards"}, "unknown mode"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(
    options: dict[str, Any], message: str, model: Any, custom: dict[str, Any]
) -> None:
    with pytest.raises(GenerationError, match=message):
        model.generate(IDS, **{"max_new_tokens": 4, **options}, **custom)


def test_no_prompt(model: Any, custom: dict[str, Any]) -> None:
    with pytest.raises(GenerationError, match="input_ids"):
        model.generate(max_new_tokens=4, **custom)


def test_the_file_is_plain_text_of_the_package(path: str) -> None:
    import flarec

    template = Path(flarec.__file__).parent / "checkpoint" / "templates" / "generate.py"
    assert (Path(path) / "custom_generate" / "generate.py").read_bytes() == template.read_bytes()
