"""Passes and the runner. A pass is data: a frozen dataclass whose fields are its options.

Pipelines are literal lists (`flarec.passes`); the runner never reorders them. What a pass requires and provides is
checked before anything runs. After each pass every new node is looked at (`Checks.watch`), and every provided property
is checked on the graph: all of them at the end of a pipeline, after each pass with `debug=True`.
"""

from __future__ import annotations

import abc
import ast
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from ..errors import PassError, PropertyError, UsageError
from .program import Program, Record, locate

if TYPE_CHECKING:
    import networkx as nx

Checker = Callable[[Program], None]
"""Raises `PropertyError` if the property does not hold."""


@dataclass(frozen=True)
class Property:
    """Something that holds for a program from one pass on, with the checker that looks it up on the graph.

    A pass names the properties of this package by text ("masked"), and brings its own as an object.
    """

    name: str
    check: Checker = field(repr=False)


Claims = frozenset[str | Property]


def names_of(claims: Iterable[str | Property]) -> frozenset[str]:
    """The names of properties that a pass gives as names or as objects."""
    return frozenset(claim.name if isinstance(claim, Property) else claim for claim in claims)


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
    """A rewrite of a program. Subclasses are frozen dataclasses with these class variables.

    name          in the text of a pipeline
    requires      properties that hold before it, by name or as `Property`
    provides      properties that hold after it, each with a checker
    invalidates   properties that may not hold any more; what needs one has to come earlier, or after a new provider
    targets       pipelines that it belongs to
    may_be_empty  whether finding nothing to rewrite is right
    """

    name: ClassVar[str]
    requires: ClassVar[Claims] = frozenset()
    provides: ClassVar[Claims] = frozenset()
    invalidates: ClassVar[Claims] = frozenset()
    targets: ClassVar[frozenset[str]] = frozenset({"train", "decode"})
    may_be_empty: ClassVar[bool] = False

    @abc.abstractmethod
    def apply(self, program: Program) -> list[fx.Node]:
        """Rewrite the graph in place and return the sites (nodes) that were rewritten or made."""

    def fail(self, node: fx.Node, what: str, cure: str) -> PassError:
        return PassError(f"pass '{self.name}': {locate(node)}: {what}; {cure}")

    def text(self) -> str:
        """`name(option=value, ...)`, options that differ from the default only; `parse_pass` reads it back."""
        options = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(options)})"


Pipeline = Sequence[Pass]


def pipeline_text(pipeline: Pipeline) -> str:
    """One pass per line; goes into the checkpoint's manifest."""
    return "\n".join(step.text() for step in pipeline)


class UnknownPass(UsageError):
    """A pipeline's text names a pass that nobody here knows; `name` is its name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown pass '{name}' in a pipeline; known: {', '.join(sorted(known))}")
        self.name = name


def parse_pass(text: str, known: Mapping[str, type[Pass]]) -> Pass:
    """`name(option=value, ...)`, or `name` alone. Raises `UnknownPass`, and `UsageError` for an option or its value."""
    name, parenthesis, rest = text.strip().partition("(")
    if name not in known:
        raise UnknownPass(name, known)
    try:
        call = ast.parse(f"f({rest if parenthesis else ')'}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise ValueError("options have names")
        return known[name](**{str(k.arg): ast.literal_eval(k.value) for k in call.keywords})
    except (SyntaxError, TypeError, ValueError) as error:
        raise UsageError(f"pass '{text}' cannot be read: {error}; write name(option=value, ...)") from error


def parse_pipeline(text: str, known: Mapping[str, type[Pass]]) -> list[Pass]:
    """The inverse of `pipeline_text`. Raises `UnknownPass`, and `UsageError` for an unknown option."""
    return [parse_pass(line, known) for line in text.splitlines() if line.strip()]


def dependency_graph(pipeline: Pipeline, given: frozenset[str]) -> nx.DiGraph[str]:
    """Passes and properties of a pipeline; edges run provider -> property -> user. For checking and for drawing."""
    import networkx as nx  # slow to import, and no compilation needs it

    graph: nx.DiGraph[str] = nx.DiGraph()
    for name in given:
        graph.add_node(name, kind="property")
    for step in pipeline:
        graph.add_node(step.text(), kind="pass")
        for name in names_of(step.requires):
            graph.add_edge(name, step.text())
            graph.nodes[name]["kind"] = "property"
        for name in names_of(step.provides):
            graph.add_edge(step.text(), name)
            graph.nodes[name]["kind"] = "property"
    return graph


def check_order(pipeline: Pipeline, given: frozenset[str]) -> frozenset[str]:
    """The properties that hold in the end. Raises `PassError`, which names both sides, for a requirement that does not
    hold where it stands."""
    have = set(given)
    lost: dict[str, str] = {}
    for step in pipeline:
        for name in sorted(names_of(step.requires) - have):
            providers = [other.text() for other in pipeline if name in names_of(other.provides)]
            where = f"it is provided only later, by {', '.join(providers)}" if providers else "no pass provides it"
            where = f"'{lost[name]}' before it invalidates it" if name in lost else where
            raise PassError(f"pass '{step.name}' requires '{name}': {where}; reorder the pipeline")
        lost |= dict.fromkeys(names_of(step.invalidates) & have, step.name)
        have = have - names_of(step.invalidates) | names_of(step.provides)
    return frozenset(have)


def place(pipeline: Pipeline, step: Pass, given: frozenset[str], before: str) -> int:
    """The index at which a foreign pass goes in: the latest one up to the pass `before` at which what it requires holds
    and what follows still finds what it requires. Raises `PassError` if there is none."""
    last = next((i for i, other in enumerate(pipeline) if other.name == before), len(pipeline))
    first_error: PassError | None = None
    for index in range(last, -1, -1):
        try:
            check_order([*pipeline[:index], step, *pipeline[index:]], given)
        except PassError as error:
            first_error = first_error or error
        else:
            return index
    raise PassError(f"pass '{step.name}' has no place before {before}: {first_error}") from first_error


def run_pipeline(
    program: Program,
    pipeline: Pipeline,
    checks: Checks,
    *,
    debug: bool = False,
    on_pass: Callable[[str, Program], None] | None = None,
) -> Program:
    """Apply the passes to a clone of the program, in order, and check what they did and what they claim.

    on_pass: called with "" before the first pass and with a pass's text after each, and with the program as it is then.

    Raises `PassError` for a pass that finds nothing although it should, `PropertyError` for a node that may not be
    there and for a claim that does not hold.
    """
    check_order(pipeline, program.properties)
    checkers = _checkers(pipeline, checks.properties)
    program = program.clone()
    watch = checks.watch()
    _look(watch, program, "the program before the first pass")
    before = program.op_counts()
    if on_pass is not None:
        on_pass("", program)
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
        provides = names_of(step.provides)
        program.properties = program.properties - names_of(step.invalidates) | provides
        options = {f.name: getattr(step, f.name) for f in fields(step)}
        done = Record(step.text(), names, delta, seconds, tuple(sorted(provides)), step.name, options)
        program.history += (done,)
        _look(watch, program, f"pass '{step.name}'")
        if on_pass is not None:
            on_pass(step.text(), program)
        if debug:
            check_properties(program, checkers)
    program.finish()
    check_properties(program, checkers)
    return program


def _checkers(pipeline: Pipeline, known: Mapping[str, Checker]) -> dict[str, Checker]:
    """Those of the package, and those that passes bring. A name has one meaning."""
    checkers = dict(known)
    for step in pipeline:
        for claim in (*step.requires, *step.provides, *step.invalidates):
            if isinstance(claim, Property) and checkers.setdefault(claim.name, claim.check) is not claim.check:
                raise PassError(
                    f"pass '{step.name}' brings a property '{claim.name}', a name that stands for another one already; "
                    "choose another name"
                )
    return checkers


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
