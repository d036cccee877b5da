"""Mutation testing of the files that prove things: which of their lines could be wrong without a test that fails?

`python -m tests.mutation jaxsrn/bounds/covers.py` changes one operator, number or function of that file at a time, and
runs the tests that `HELD_BY` names. A change that they let pass is a survivor, and is printed. Without a file, all of
them are taken. Results are kept in `build/mutation`, so that a run that was stopped goes on where it was, and `--again`
tests the survivors anew. `tests/README.md` records what came out.

The changes are those of cosmic-ray. Its own runs write each into the source and start the tests anew, which for these
tests takes twenty times as long. Here one process imports all once, and a change replaces the code of the functions.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import importlib
import inspect
import json
import os
import pathlib
import signal
import sys
import types
from typing import NamedTuple

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "mutation"
# A change that keeps the tests from ending for so many seconds fails them; its process is ended.
LONGEST = 300


class Held(NamedTuple):
    """The tests that hold a file, as arguments of pytest.

    Attributes:
      tests: those that find most come first, as the run of a change ends at the first test that fails.
        They call the functions as they are, not their compiled programs, which would not see a change.
      functions: the functions that are changed, by default all. The others check arguments, or search for what is
        proven.
    """

    tests: tuple[str, ...]
    functions: tuple[str, ...] = ()


def proofs(of: str, which: str, *functions: str) -> Held:
    """The tests of these names in `test_proofs_*.py`, for the changes of these functions."""
    return Held((*(f"tests/test_proofs_{part}.py" for part in of.split()), "-k", which), functions)


HELD_BY = {
    "jaxsrn/_tools/proofs.py": proofs("frequencies bounds", "below or rounding"),
    "jaxsrn/bounds/banded.py": proofs("banded", "limits or blocks or work"),
    "jaxsrn/bounds/covers.py": proofs("bounds", "cover or rounding or coefficients"),
    "jaxsrn/bounds/coefficients.py": proofs("bounds", "coefficients or matrix_norms"),
    "jaxsrn/bounds/entries.py": proofs("bounds", "coefficients or lip_bound", "_lip_bound", "_l1", "_channel_l1"),
    "jaxsrn/bounds/reshapings.py": proofs("bounds", "coefficients", "_fantastic_four", "_reshapings"),
    "jaxsrn/bounds/gram.py": proofs("bounds", "written_out or cancel", "_gram_iteration", "_bound_of_cover"),
    "jaxsrn/bounds/interval.py": proofs("bounds", "interval or beyond or cancel"),
    "jaxsrn/bounds/tensor.py": proofs("bounds", "power_method or tensor_norm"),
    "jaxsrn/normalization/closed_form.py": proofs("closed_form", "test"),
    "jaxsrn/spectra/circular/grid_certificate.py": proofs("frequencies bounds", "grid or overshoot"),
    "jaxsrn/spectra/circular/boxes.py": proofs("frequencies", "grid or boxes"),
    "jaxsrn/spectra/circular/branch_and_bound.py": proofs("frequencies", "low or spread", "_are_low", "_spread"),
    "jaxsrn/projections/augmented_lagrangian.py": proofs(
        "projections", "lagrangian or gap", "duality_gap", "distance_and_excess", "_evaluate"
    ),
    "jaxsrn/projections/frequency_passes.py": proofs(
        "projections",
        "passes or polar or frequencies",
        *(
            "few_frequencies",
            "_on_part_of_grid",
            "polar",
            "unit_direction",
            "nuclear_norm",
            "_gain",
            "feasible_multiplier",
        ),
        "solved",
    ),
    "jaxsrn/projections/nearest.py": Held(
        ("tests/test_projections.py", "-k", "taper"), ("_taper", "_axis_taper", "_half_sine")
    ),
}

# One change of each operator is enough: a shape or a unit is wrong, an order relation moves its end or turns around.
OPERATORS = [
    f"core/{kind}{change}"
    for kind, changes in {
        "ReplaceBinaryOperator_": "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_Mul Pow_Mul BitAnd_BitOr "
        "BitOr_BitAnd RShift_LShift",
        "ReplaceComparisonOperator_": "Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt "
        "Is_IsNot IsNot_Is",
        "ReplaceUnaryOperator_Delete_": "USub Invert Not",
        "Replace": "TrueWithFalse FalseWithTrue AndWithOr OrWithAnd",
        "": "AddNot NumberReplacer",
    }.items()
    for change in changes.split()
]


class ExchangeFunction(Operator):
    """Exchanges functions that are easily mixed up."""

    pairs = ("minimum", "maximum"), ("min", "max"), ("any", "all"), ("floor", "ceil"), ("cos", "sin")
    names = {name: other for pair in pairs for name, other in (pair, pair[::-1])}  # noqa: RUF012

    def mutation_positions(self, node):
        if isinstance(node, parso.python.tree.Name) and node.value in self.names:
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        return parso.python.tree.Name(self.names[node.value], node.start_pos, node.prefix)

    @classmethod
    def examples(cls):
        return ()


def left_alone(source: str, functions: tuple[str, ...]) -> list[ast.AST]:
    """What says nothing of a proof: annotations, decorators, and what is outside of functions, such as limits of work.

    With functions named, all others too.
    """
    tree = ast.parse(source)
    found = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    if functions:
        found = [node for node in tree.body if getattr(node, "name", None) not in functions]
    for node in ast.walk(tree):
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation:
            found.append(node.annotation)
        if isinstance(node, ast.FunctionDef):
            found += [*node.decorator_list, *([node.returns] if node.returns else [])]
        # Lengths that differ are a mistake in the source, and no input makes them.
        if isinstance(node, ast.keyword) and node.arg == "strict":
            found.append(node)
    return found


def mutants(source: str, functions: tuple[str, ...] = ()):
    """Every changed source, with the number of its line."""
    places = [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in left_alone(source, functions)]
    for operator in (*(get_operator(name)() for name in OPERATORS), ExchangeFunction()):
        positions = [place for node in ast_nodes(get_ast(source)) for place in operator.mutation_positions(node)]
        for occurrence, (start, end) in enumerate(positions):
            if not any(first <= start and end <= last for first, last in places):
                yield start[0], mutate_code(source, operator, occurrence)


def functions_of(namespace: dict, module: str) -> dict[str, types.FunctionType]:
    """The functions and methods that a module defines, by their qualified names, without decorators."""
    found = {}
    for value in [*namespace.values()]:
        members = vars(value).values() if isinstance(value, type) and value.__module__ == module else (value,)
        for member in members:
            member = member.fget if isinstance(member, property) else member
            function = inspect.unwrap(member) if callable(member) else None
            if isinstance(function, types.FunctionType) and function.__module__ == module:
                found[function.__qualname__] = function
    return found


def replace_code(module: types.ModuleType, source: str) -> None:
    """Gives the functions of a module the code that another source has for them, wherever they were imported."""
    other = {"__name__": module.__name__}
    exec(compile(source, module.__file__, "exec"), other)
    replaced = functions_of(other, module.__name__)
    for name, function in functions_of(vars(module), module.__name__).items():
        function.__code__, function.__defaults__ = replaced[name].__code__, replaced[name].__defaults__
        function.__kwdefaults__ = replaced[name].__kwdefaults__


class EveryChange:
    """A plugin of pytest that runs the collected tests on every change of a file, and keeps what comes out."""

    def __init__(self, name: str, changes: dict[str, str], kept: pathlib.Path):
        self.source, self.changes, self.kept = (ROOT / name).read_text(), changes, kept
        self.module = name.removesuffix(".py").replace("/", ".")

    def pytest_runtestloop(self, session):
        if not passes(session.items):
            session.shouldfail = "the tests fail without a change"
            return True
        module = importlib.import_module(self.module)
        for key, changed in self.changes.items():
            results = json.loads(self.kept.read_text())
            if key in results:
                continue
            # What is kept before the tests stays where they do not end.
            self.kept.write_text(json.dumps(results | {key: "killed"}))
            signal.alarm(LONGEST)
            if survives(module, changed, session.items):
                self.kept.write_text(json.dumps(results | {key: "survived"}))
            signal.alarm(0)
            replace_code(module, self.source)
        return True


def survives(module, changed: str, items) -> bool:
    try:
        replace_code(module, changed)
    except Exception:
        return False
    return passes(items)


def passes(items) -> bool:
    from _pytest.runner import runtestprotocol

    return all(all(report.passed for report in runtestprotocol(item, nextitem=None, log=False)) for item in items)


def run_tests(name: str, changes: dict[str, str], kept: pathlib.Path) -> int:
    """The exit status of a process of its own that runs the tests on all changes."""
    process = os.fork()
    if process == 0:
        output = kept.with_suffix(".txt").open("w")
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        # Compiled programs are kept for the next run.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(BUILD / "programs")
        os.environ["JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        import pytest

        # Types are not checked: a change is to be found by its numbers.
        options = ["-q", "--tb=short", "-o", "addopts=", "-p", "no:cacheprovider"]
        os._exit(pytest.main([*options, *HELD_BY[name].tests], plugins=[EveryChange(name, changes, kept)]))
    return os.waitpid(process, 0)[1]


def run_file(name: str, again: bool) -> None:
    """Prints the survivors of a file."""
    source = (ROOT / name).read_text()
    found = mutants(source, HELD_BY[name].functions)
    changes = {hashlib.sha256(text.encode()).hexdigest(): text for _, text in sorted(found)}
    kept = BUILD / (name.removesuffix(".py").replace("/", ".") + ".json")
    results = json.loads(kept.read_text()) if kept.exists() else {}
    kept.write_text(json.dumps({key: what for key, what in results.items() if not (again and what == "survived")}))
    while missing := changes.keys() - json.loads(kept.read_text()).keys():
        # Only a change whose tests do not end may end the process.
        status = run_tests(name, changes, kept)
        if status not in (0, signal.SIGALRM) or missing == changes.keys() - json.loads(kept.read_text()).keys():
            sys.exit(f"{name}: the tests fail without a change; see {kept.with_suffix('.txt')}")
    results = json.loads(kept.read_text())
    survivors = [text for key, text in changes.items() if results[key] == "survived"]
    for text in survivors:
        print(*difflib.unified_diff(source.splitlines(), text.splitlines(), name, name, lineterm="", n=0), sep="\n")
    killed = len(changes) - len(survivors)
    print(f"{name}: {len(changes)} changes, {killed} killed, {len(survivors)} survived", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(HELD_BY), metavar="file", help="of those in HELD_BY")
    parser.add_argument("--again", action="store_true", help="test the survivors of earlier runs again")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    for name in options.files:
        run_file(name, options.again)


if __name__ == "__main__":
    main()
