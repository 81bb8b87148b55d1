"""The class of `--worker-cls`: vLLM's worker for this machine, whose runner drafts with masks."""

from __future__ import annotations

from typing import Any

try:
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname
except ImportError as error:
    raise ImportError("vLLM is not installed; run: pip install 'flarec[vllm]'") from error

from .checks import check_version, installed
from .repair import repair_sampling
from .runner import put_before

WORKERS = {"cpu": "vllm.v1.worker.cpu_worker.CPUWorker", "cuda": "vllm.v1.worker.gpu_worker.Worker"}
"""vLLM's own workers by the kind of device. Others were never tried."""


class MaskedWorker:
    """Methods over those of a worker."""

    def init_device(self) -> None:
        check_version(installed())
        repair_sampling()
        super().init_device()  # type: ignore[misc]
        put_before(self.model_runner)  # type: ignore[attr-defined]


def _worker() -> Any:
    device = current_platform.device_type
    if device not in WORKERS:
        raise ImportError(f"flarec drafts in vLLM on {' and '.join(WORKERS)}, and this machine is {device}")
    return type("Worker", (MaskedWorker, resolve_obj_by_qualname(WORKERS[device])), {})


Worker = _worker()
