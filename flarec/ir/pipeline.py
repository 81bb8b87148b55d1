"""Passes and the runner. A pass is data: a frozen dataclass whose fields are its options.

Pipelines are literal lists (`flarec.passes`); the runner never reorders them. What a pass requires and provides is
checked before anything runs. After each pass every new node is looked at (`Checks.watch`), and every provided property is
checked on the graph: all of them at the end of a pipeline, after each pass with `debug=True`.
"""

from __future__ import annotations

import abc
import ast
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from ..errors import PassError, PropertyError, UsageError
from .program import Program, Record, locate

if TYPE_CHECKING:
    import networkx as nx

Checker = Callable[[Program], None]
"""Raises `PropertyError` if the property does not hold."""


@dataclass(frozen=True)
class Checks:
    """What the runner checks.

    properties: a checker for every property that may be claimed
    watch: gives, for one run, what is called with the program before the first pass and after every pass. It infers the
    spec of every new or changed node, whatever the pass noted in `meta["val"]`, and raises `PropertyError` for a node
    that has none or that a program may not hold
    """

    properties: Mapping[str, Checker]
    watch: Callable[[], Checker]


@dataclass(frozen=True)
class Pass(abc.ABC):
    """A rewrite of a program. Subclasses are frozen dataclasses with these class variables."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    may_be_empty: ClassVar[bool] = False

    @abc.abstractmethod
    def apply(self, program: Program) -> list[fx.Node]:
        """Rewrite the graph in place and return the sites (nodes) that were rewritten or made."""

    def fail(self, node: fx.Node, what: str, cure: str) -> PassError:
        return PassError(f"pass '{self.name}': {locate(node)}: {what}; {cure}")

    def text(self) -> str:
        """`name(option=value, ...)`, options that differ from the default only; `parse` reads it back."""
        options = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(options)})"


Pipeline = Sequence[Pass]


def pipeline_text(pipeline: Pipeline) -> str:
    """One pass per line; goes into the checkpoint's manifest."""
    return "\n".join(step.text() for step in pipeline)


def parse_pipeline(text: str, known: Mapping[str, type[Pass]]) -> list[Pass]:
    """The inverse of `pipeline_text`. Raises `UsageError` for an unknown pass or option."""
    result: list[Pass] = []
    for line in filter(None, (part.strip() for part in text.splitlines())):
        name, _, rest = line.partition("(")
        if name not in known:
            raise UsageError(f"unknown pass '{name}' in a pipeline; known: {', '.join(sorted(known))}")
        try:
            call = ast.parse(f"f({rest}", mode="eval").body
            if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
                raise ValueError("options have names")
            result.append(known[name](**{str(k.arg): ast.literal_eval(k.value) for k in call.keywords}))
        except (SyntaxError, TypeError, ValueError) as error:
            raise UsageError(f"pass '{line}' cannot be read: {error}; write name(option=value, ...)") from error
    return result


def dependency_graph(pipeline: Pipeline, given: frozenset[str]) -> nx.DiGraph[str]:
    """Passes and properties of a pipeline; edges run provider -> property -> user. For checking and for drawing."""
    import networkx as nx  # slow to import, and no compilation needs it

    graph: nx.DiGraph[str] = nx.DiGraph()
    for name in given:
        graph.add_node(name, kind="property")
    for step in pipeline:
        graph.add_node(step.text(), kind="pass")
        for name in step.requires:
            graph.add_edge(name, step.text())
            graph.nodes[name]["kind"] = "property"
        for name in step.provides:
            graph.add_edge(step.text(), name)
            graph.nodes[name]["kind"] = "property"
    return graph


def check_order(pipeline: Pipeline, given: frozenset[str]) -> None:
    """Every required property is given or provided by an earlier pass; else `PassError` names both sides."""
    have = set(given)
    for step in pipeline:
        for name in sorted(step.requires - have):
            providers = [other.text() for other in pipeline if name in other.provides]
            where = f"it is provided only later, by {', '.join(providers)}" if providers else "no pass provides it"
            raise PassError(f"pass '{step.name}' requires '{name}': {where}; reorder the pipeline")
        have |= step.provides


def run_pipeline(program: Program, pipeline: Pipeline, checks: Checks, *, debug: bool = False) -> Program:
    """Apply the passes to a clone of the program, in order, and check what they did and what they claim.

    Raises `PassError` for a pass that finds nothing although it should, `PropertyError` for a node that may not be there
    and for a claim that does not hold.
    """
    check_order(pipeline, program.properties)
    program = program.clone()
    watch = checks.watch()
    _look(watch, program, "the program before the first pass")
    before = program.op_counts()
    for step in pipeline:
        start = time.perf_counter()
        sites = step.apply(program)
        if not sites and not step.may_be_empty:
            raise PassError(f"pass '{step.name}' found nothing to rewrite; the program is not what this pass expects")
        if debug:
            program.graph.lint()
        after = program.op_counts()
        delta = {op: after[op] - before[op] for op in sorted(before | after) if after[op] != before[op]}
        before = after
        names = tuple(node.name for node in sites)
        seconds = time.perf_counter() - start
        program.properties |= step.provides
        program.history += (Record(step.text(), names, delta, seconds, tuple(sorted(step.provides))),)
        _look(watch, program, f"pass '{step.name}'")
        if debug:
            check_properties(program, checks.properties)
    program.finish()
    check_properties(program, checks.properties)
    return program


def _look(watch: Checker, program: Program, by: str) -> None:
    try:
        watch(program)
    except PropertyError as error:
        raise PropertyError(f"{by}: {error}") from error


def check_properties(program: Program, checkers: Mapping[str, Checker]) -> None:
    """Run the checker of every property that the program claims."""
    for name in sorted(program.properties):
        if name not in checkers:
            raise PropertyError(f"property '{name}' has no checker; a claim that is not checked is not made")
        try:
            checkers[name](program)
        except PropertyError as error:
            provider = next((r.step for r in reversed(program.history) if name in r.provides), "capture()")
            raise PropertyError(f"property '{name}' (claimed by {provider}) does not hold: {error}") from error
