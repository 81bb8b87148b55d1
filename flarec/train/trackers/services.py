"""The trackers themselves: each takes the run's configuration once, and numbers by name and step."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

PROJECT = "flarec"
"""Of runs, unless WANDB_PROJECT or TRACKIO_PROJECT names another."""


class Tracker(Protocol):
    """One service, open for one run."""

    where: str
    """For people: where to look."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of an optimizer step, by name."""

    def close(self) -> None:
        """All that was logged is on its way."""


class TensorBoard:
    """Event files of the run in a folder of its own; those of an earlier process are replaced."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.where = f"tensorboard --logdir {folder.parent}"
        self.writer: Any = SummaryWriter(str(folder))
        self.writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```", 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases that later processes continue under the same id. Steps are a metric of their own,
    `step`: wandb's counter would refuse an evaluation behind its step."""

    def __init__(self, run_id: str, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self.run = wandb.init(project=project, id=run_id, name=name, config=dict(config), resume="allow")
        self.run.define_metric("step")
        for group in ("train/*", "eval/*"):
            self.run.define_metric(group, step_metric="step")
        self.where = f"wandb project {project}, run {run_id}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({**values, "step": step})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of trackio that later processes continue under the same name."""

    def __init__(self, run_id: str, name: str, config: Mapping[str, Any]) -> None:
        import trackio

        self.trackio = trackio
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        run = f"{name}-{run_id}"
        with contextlib.redirect_stdout(sys.stderr):  # it prints; stdout belongs to the command
            trackio.init(project=project, name=run, config=dict(config), resume="allow", embed=False)
        self.where = f"trackio show --project {project}, run {run}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.trackio.log(dict(values), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self.trackio.finish()
