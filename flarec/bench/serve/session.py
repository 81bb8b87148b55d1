"""A whole run against one server: every mode at every load, one after another."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ...errors import UsageError
from .client import Server, ServerError
from .load import Answered, ask, closed_loop, open_loop, requests_of
from .results import LoadResult, counters, result


@dataclass(frozen=True)
class LoadPlan:
    """What to send.

    prompts   texts, or lists of messages
    modes     of flarec's own server; an empty string sends none, as for other servers
    clients   of the closed loops; rates: requests per second of the open loops
    requests  of each load; 0: four per client, sixteen at least (open loop: 64)
    fields    of every request
    chat      texts are messages of a user
    """

    prompts: Sequence[Any]
    modes: Sequence[str] = ("",)
    clients: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    rates: Sequence[float] = ()
    requests: int = 0
    fields: dict[str, Any] = field(default_factory=dict)
    chat: bool = True


async def run_loads(server: Server, plan: LoadPlan, say: Callable[[LoadResult], None]) -> list[LoadResult]:
    """Send every load of the plan. One request per mode goes first and does not count. Raises `ServerError`."""
    model = json.loads(await server.get(server.path + "/models"))["data"][0]["id"]
    chat = plan.chat or not isinstance(plan.prompts[0], str)
    path = "/chat/completions" if chat else "/completions"
    found: list[LoadResult] = []
    for mode in plan.modes:
        fields = {"model": model, **plan.fields, **({"mode": mode} if mode else {})}
        fields_of = requests_of(plan.prompts, fields, chat=chat)
        first = await ask(server, path, fields_of(0))
        if first.error is not None:
            raise UsageError(f"the server refuses what would be sent: {first.error}")

        async def send(number: int, fields_of: Callable[[int], dict[str, Any]] = fields_of) -> Answered:
            return await ask(server, path, fields_of(number))

        loads = [("closed", float(clients), partial(closed_loop, send, plan.requests or max(16, 4 * clients), clients))
                 for clients in plan.clients]
        loads += [("open", rate, partial(open_loop, send, plan.requests or 64, rate)) for rate in plan.rates]
        for kind, load, run in loads:
            before, start = await _counters(server), time.perf_counter()
            answers = await run()
            seconds = time.perf_counter() - start
            found.append(result(mode or "default", kind, load, answers, seconds, before, await _counters(server)))
            say(found[-1])
    return found


async def _counters(server: Server) -> dict[str, float]:
    """Of `/metrics`, which lies beside the base URL; none where a server has none."""
    try:
        return counters((await server.get("/metrics")).decode(errors="replace"))
    except ServerError:
        return {}
