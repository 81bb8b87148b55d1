"""One small model for all tests of the server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flarec import api
from flarec.serve.app import Limits, Service
from tests.checkpoints import converted
from tests.serve.serving import NAME, served


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> api.Model:
    return api.load(converted(tmp_path_factory.mktemp("serve"), "llama")[1])


@pytest.fixture(scope="module")
def service(model: api.Model) -> Service:
    return Service(model, NAME, limits=Limits(queue=64, body=100_000))


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with served(service) as url:
        yield url
