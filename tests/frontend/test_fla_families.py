"""Models of flash-linear-attention where the library is not installed: as in the environment of these tests.

The models themselves are tested in an environment of their own, by `make test-fla` (`tests_fla`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import transformers

from flarec.errors import UsageError
from flarec.frontend.export import load_model
from flarec.frontend.fla import families
from tests.models import tiny_config


@pytest.mark.parametrize("model_type", ["gated_deltanet", "gla", "rwkv7"])
def test_a_directory_of_the_library_says_what_to_install(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "hidden_size": 64}))
    with pytest.raises(UsageError, match=rf"'{model_type}'.*pip install flash-linear-attention"):
        load_model(tmp_path, None, "cpu")


def test_models_of_transformers_do_without_it() -> None:
    """Also where both libraries have a model of a name."""
    assert families.row_of(tiny_config("bamba")) is None
    assert families.row_of(transformers.Mamba2Config()) is None
    families.prepare("mamba2")
    families.prepare("bamba")
    with families.without_flash_attention():
        pass
    assert not {name for name in sys.modules if name.split(".")[0] == "fla"}


def test_a_model_type_converts_or_is_refused() -> None:
    assert not {*families.MODEL_TYPES} & {*families.REFUSED}
    assert all(reason and not reason.endswith(".") for reason in families.REFUSED.values())
