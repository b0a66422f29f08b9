"""House rules that a machine can check: layers, purity, sizes, forbidden constructs, docstrings and the lock.

Each rule is a generator that takes one module and yields a finding for each violation. It is run twice: over
src/messenger, where it must find nothing, and over planted violations, each of which it must find, so that no rule is
one that cannot fail.
"""

import ast
import functools
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"

# A module imports only from those to its left. A new module takes its place here.
ORDER = (
    *("errors", "limits", "interrupts", "destination", "compiled", "blocks", "wire", "control", "running", "roundtrip"),
    *("outgoing", "batch", "link", "session", "timers", "handshake", "message", "takers", "ordering"),
    *("typed", "failures", "outcomes", "streams", "exchange", "security", "transports", "endpoint", "waiting", "loop"),
    *("arguments", "base", "threads", "messenger", "spin", "futures", "handlers", "tasks", "aio"),
    *("replication", "models", "cli", "dashboard"),
)
CORE = {
    "interrupts",
    "blocks",
    "wire",
    "control",
    "running",
    "outgoing",
    "batch",
    "link",
    "roundtrip",
    "session",
    "timers",
    "handshake",
    "message",
    "takers",
    "ordering",
    "failures",
    "outcomes",
    "streams",
    "exchange",
    "transports",
    "endpoint",
    "loop",
    "arguments",
    "base",
    "threads",
    "futures",
    "handlers",
    "spin",
    "tasks",
}
COMPONENTS = {"replication", "models"}
# What others may use that `messenger` does not export: marks of what a Ctrl-C must not cut in two, and its handler.
SHARED = {"interrupts"}
SURFACES = {"cli", "dashboard"}

PURE = {
    *("errors", "limits", "blocks", "wire", "control", "running", "outgoing", "batch", "link", "roundtrip", "session"),
    *("timers", "handshake", "message", "takers", "ordering", "failures", "outcomes", "streams", "exchange"),
}
WHEEL = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
COMPILED = set(WHEEL["hooks"]["custom"]["modules"])
IMPURE_IMPORTS = {
    *("asyncio", "concurrent", "datetime", "io", "logging", "multiprocessing", "os", "pathlib", "queue", "random"),
    *("secrets", "select", "selectors", "signal", "socket", "subprocess", "threading", "time", "uuid", "zmq"),
}

# Without the docstring, which a public function needs however short it is.
FUNCTION_LINES_MAX = 55
FILE_LINES_MAX = 520

# Each of these runs code that arrives as data.
FORBIDDEN_IMPORTS = {"cloudpickle", "dill", "marshal", "pickle", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "recv_pyobj", "send_pyobj"}


@dataclass(frozen=True)
class Module:
    """One source file; its path is relative to src."""

    path: str
    source: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, self.path)

    @property
    def layer(self) -> str:
        return self.path.removesuffix(".py").split("/")[1]

    @property
    def package(self) -> list[str]:
        return self.path.split("/")[:-1]


class Finding(NamedTuple):
    line: int
    text: str


Rule = Callable[[Module], Iterator[Finding]]


def imports(module: Module) -> Iterator[tuple[int, list[str]]]:
    """Yields the line and the absolute dotted name, split at its dots, of all that the module imports, at any depth."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")
        elif isinstance(node, ast.ImportFrom):
            base = module.package[: len(module.package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield node.lineno, [*base, alias.name]


def layers(module: Module) -> Iterator[Finding]:
    own = module.layer
    if own in ("__init__", "__main__"):
        return
    if own not in ORDER:
        yield Finding(1, f"{own} has no place in ORDER")
        return
    for line, name in imports(module):
        target = name[1] if len(name) > 1 else ""
        if name[0] != "messenger" or target == own:
            continue
        dotted = ".".join(name)
        public = (target not in ORDER or target in SHARED) and len(name) <= 2
        if own in COMPONENTS and not public:
            yield Finding(line, f"{own} imports {dotted}, but a component uses only what `messenger` itself exports")
        elif own in SURFACES and target in CORE and not public:
            yield Finding(line, f"{own} imports {dotted}, but nothing reaches inside the core")
        elif own in COMPONENTS | SURFACES and public:
            continue
        elif target not in ORDER:
            yield Finding(line, f"{own} imports {dotted}, which is in no layer")
        elif ORDER.index(target) > ORDER.index(own):
            yield Finding(line, f"{own} imports {dotted}, which stands to its right")


def purity(module: Module) -> Iterator[Finding]:
    if module.layer in PURE:
        for line, name in imports(module):
            if name[0] in IMPURE_IMPORTS:
                yield Finding(line, f"{module.layer} is pure, but imports {'.'.join(name)}")


def sizes(module: Module) -> Iterator[Finding]:
    lines_count = len(module.source.splitlines())
    if lines_count > FILE_LINES_MAX:
        yield Finding(lines_count, f"the file has {lines_count} lines, the limit is {FILE_LINES_MAX}")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines_count = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines_count -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            if lines_count > FUNCTION_LINES_MAX:
                yield Finding(node.lineno, f"{node.name} has {lines_count} lines, the limit is {FUNCTION_LINES_MAX}")


def forbidden_code(module: Module) -> Iterator[Finding]:
    for line, name in imports(module):
        if name[0] in FORBIDDEN_IMPORTS:
            yield Finding(line, f"imports {name[0]}, which can execute what it reads")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", None))
            if called in FORBIDDEN_CALLS:
                yield Finding(node.lineno, f"calls {called}, which can execute what it is given")


def asserts(module: Module) -> Iterator[Finding]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Assert):
            yield Finding(node.lineno, "asserts, which `python -O` removes: raise an error")


def swallowed_exceptions(module: Module) -> Iterator[Finding]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            broad = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            if node.type is None:
                yield Finding(node.lineno, "a bare `except:` also catches the end of the program")
            elif broad and all(isinstance(statement, ast.Pass) for statement in node.body):
                yield Finding(node.lineno, "swallows every exception: count it, report it or name it")


def unfinished_work(module: Module) -> Iterator[Finding]:
    for line, text in enumerate(module.source.splitlines(), start=1):
        if match := re.search(r"\b(TODO|FIXME|XXX)\b", text):
            yield Finding(line, f"{match[0]} belongs in an issue")


def docstrings(module: Module) -> Iterator[Finding]:
    if ast.get_docstring(module.tree) is None:
        yield Finding(1, "the module has no docstring")
    pending: list[ast.Module | ast.ClassDef] = [module.tree]
    while pending:
        for node in pending.pop().body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
                continue
            # An overload and a setter share the docstring of the function that they stand beside.
            decorators = {getattr(decorator, "attr", getattr(decorator, "id", "")) for decorator in node.decorator_list}
            if ast.get_docstring(node) is None and not decorators & {"overload", "setter", "deleter"}:
                yield Finding(node.lineno, f"{node.name} is public and has no docstring")
            if isinstance(node, ast.ClassDef):
                pending.append(node)


def compiled_classes(module: Module) -> Iterator[Finding]:
    """mypyc drops what a class statement says beside the bases, silently: a struct would have another form."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef) and node.keywords and module.layer in COMPILED:
            yield Finding(node.lineno, f"class {node.name} has {node.keywords[0].arg}=, which mypyc drops")


def compiled_defaults(module: Module) -> Iterator[Finding]:
    """A call in compiled code that leaves a float to its default comes as 0.0, if the object's class is interpreted."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef) and node.decorator_list and module.layer in COMPILED:
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    positional = method.args.args[::-1][: len(method.args.defaults)]
                    for argument in positional + method.args.kwonlyargs:
                        if isinstance(argument.annotation, ast.Name) and argument.annotation.id == "float":
                            yield Finding(method.lineno, f"{argument.arg} is a float that may be left to its default")


def compiled_attributes(module: Module) -> Iterator[Finding]:
    """mypyc takes what `__init__` sets for the first value, and never lets go of one that a base had set before."""
    classes = {
        node.name: node
        for each in [*source_modules(), module]
        if each.layer in COMPILED
        for node in ast.walk(each.tree)
        if isinstance(node, ast.ClassDef)
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef) and module.layer in COMPILED:
            bases = list(node.bases)
            while bases:
                base = classes.get(getattr(bases.pop(), "id", ""))
                if base is not None:
                    bases += base.bases
                    for name in set_when_made(node).keys() & set_when_made(base).keys():
                        yield Finding(set_when_made(node)[name], f"{name} is set by {base.name} already")


def set_when_made(node: ast.ClassDef) -> dict[str, int]:
    """Return the attributes that the `__init__` of a class sets itself, and where."""
    makers = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
    return {
        target.attr: target.lineno
        for maker in makers
        for target in ast.walk(maker)
        if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store)
    }


RULES: tuple[Rule, ...] = (
    *(layers, purity, sizes, forbidden_code, asserts, swallowed_exceptions, unfinished_work, docstrings),
    *(compiled_classes, compiled_defaults, compiled_attributes),
)


@functools.cache
def source_modules() -> list[Module]:
    paths = sorted(SOURCE.joinpath("messenger").rglob("*.py"))
    return [Module(path.relative_to(SOURCE).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def report(findings: Iterable[tuple[str, Finding]]) -> str:
    return "".join(f"\n{path}:{finding.line}: {finding.text}" for path, finding in findings)


def test_source_was_seen() -> None:
    """The rules below pass over nothing, so this one makes sure that there was something."""
    assert {module.layer for module in source_modules()} >= PURE | COMPILED


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_follows(rule: Rule) -> None:
    findings = [(f"src/{module.path}", finding) for module in source_modules() for finding in rule(module)]
    assert not findings, report(findings)


def lock_findings(text: str) -> Iterator[Finding]:
    """The lock must work with any registry and on any machine, so it names neither a host nor a path."""
    for line, content in enumerate(text.splitlines(), start=1):
        if match := re.search(r"://|index-url|find-links|trusted-host|(^|\s)/\w|@ ?file:", content):
            yield Finding(line, f"names a host, an index or a path: {match[0].strip()}")
        if re.match(r"[A-Za-z]", content) and not re.match(r"[\w.\[\]-]+==", content):
            yield Finding(line, f"is not pinned: {content}")


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-bench.lock", "requirements-fuzz.lock"])
def test_lock_names_no_host(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "--hash=sha256:" in text
    findings = [(name, finding) for finding in lock_findings(text)]
    assert not findings, report(findings)


def function_of(lines_count: int) -> str:
    return "def _long():\n" + "    pass\n" * (lines_count - 1)


# Each line of a snippet that must be found is marked with `#!`.
PLANTED: list[tuple[Rule, str, str]] = [
    (compiled_classes, "wire.py", "class Pair(Struct, frozen=True): #!\n    first: int\n"),
    (
        compiled_defaults,
        "link.py",
        "@mypyc_attr()\nclass A:\n    def f(self, at: float, s: float = 1.0): #!\n        pass\n",
    ),
    (
        compiled_attributes,
        "link.py",
        "class A:\n    def __init__(self):\n        self.a = 1\n"
        "class B(A):\n    pass\n"
        "class C(B):\n    def __init__(self):\n        self.a = self.b = 2 #!\n",
    ),
    (layers, "wire.py", "import messenger.session #!"),
    (layers, "wire.py", "from messenger.session import Session #!"),
    (layers, "wire.py", "from messenger import session #!"),
    (layers, "wire.py", "from messenger import Messenger #!"),
    (layers, "wire.py", "import messenger #!"),
    (layers, "wire.py", "from . import session #!"),
    (layers, "wire.py", "from .session import Session #!"),
    (layers, "wire.py", "def f():\n    from .session import Session #!"),
    (layers, "link.py", "from .session import Session #!"),
    (layers, "session.py", "from .handshake import Handshake #!"),
    (layers, "handshake.py", "from .exchange import Exchange #!"),
    (layers, "transports/tcp.py", "from .. import aio #!"),
    (layers, "transports/tcp.py", "from ..messenger import Messenger #!"),
    (layers, "transports/__init__.py", "from ..messenger import Messenger #!"),
    (layers, "exchange.py", "from messenger.helpers import help_me #!"),
    (layers, "helpers.py", "#!"),
    (layers, "replication/primary.py", "from messenger.errors import QueueFull #!"),
    (layers, "replication/primary.py", "from messenger import wire #!"),
    (layers, "models/manager.py", "from messenger.replication import Primary #!"),
    (layers, "cli.py", "from messenger.exchange import Exchange #!"),
    (layers, "cli.py", "from messenger.message import Statistics #!"),
    (layers, "cli.py", "from messenger.dashboard import show #!"),
    (purity, "wire.py", "import time #!"),
    (purity, "wire.py", "import os.path #!"),
    (purity, "session.py", "from random import Random #!"),
    (purity, "exchange.py", "def f():\n    import threading #!"),
    (purity, "link.py", "import queue #!"),
    (purity, "handshake.py", "from secrets import randbits #!"),
    (purity, "message.py", "import time #!"),
    (purity, "errors.py", "import zmq #!"),
    (purity, "limits.py", "import logging #!"),
    (sizes, "wire.py", function_of(FUNCTION_LINES_MAX + 1).replace(":", ": #!", 1)),
    (sizes, "wire.py", 'def _long(): #!\n    """Docstring."""\n' + "    pass\n" * FUNCTION_LINES_MAX),
    (sizes, "wire.py", "async " + function_of(FUNCTION_LINES_MAX + 1).replace(":", ": #!", 1)),
    (sizes, "wire.py", "pass\n" * FILE_LINES_MAX + "#!"),
    (forbidden_code, "cli.py", "import pickle #!"),
    (forbidden_code, "cli.py", "from marshal import loads #!"),
    (forbidden_code, "cli.py", "import shelve #!"),
    (forbidden_code, "cli.py", "eval('1') #!"),
    (forbidden_code, "cli.py", "import builtins\nbuiltins.exec('1') #!"),
    (forbidden_code, "cli.py", "socket.recv_pyobj() #!"),
    (asserts, "cli.py", "def f(x):\n    assert x #!"),
    (swallowed_exceptions, "cli.py", "try:\n    pass\nexcept: #!\n    pass"),
    (swallowed_exceptions, "cli.py", "try:\n    pass\nexcept Exception: #!\n    pass"),
    (unfinished_work, "cli.py", "# TODO: later #!"),
    (unfinished_work, "cli.py", "'FIXME' #!"),
    (unfinished_work, "cli.py", "pass # XXX #!"),
    (docstrings, "cli.py", "#!"),
    (docstrings, "cli.py", "'''M.'''\ndef f(): ... #!"),
    (docstrings, "cli.py", "'''M.'''\nasync def f(): ... #!"),
    (docstrings, "cli.py", "'''M.'''\nclass C: #!\n    '''C.''' if 0 else 1"),
    (docstrings, "cli.py", "'''M.'''\nclass C:\n    '''C.'''\n    def f(self): ... #!"),
]

ALLOWED: list[tuple[str, str]] = [
    ("wire.py", "import struct\nfrom . import errors\nfrom messenger.limits import Limits"),
    ("transports/tcp.py", "import socket\nfrom . import base\nfrom ..exchange import Exchange\nimport zmq"),
    ("transports/__init__.py", "from .tcp import Tcp\nfrom .. import wire"),
    ("aio.py", "import asyncio, time\nfrom .messenger import Messenger"),
    ("models/manager.py", "from messenger import Messenger\nimport messenger\nfrom .server import Server"),
    ("cli.py", "from messenger import Messenger\nfrom messenger.replication import Primary"),
    ("__init__.py", "from .aio import AsyncMessenger\nfrom .wire import NOOP"),
    ("__main__.py", "from messenger.cli import main"),
    ("wire.py", function_of(FUNCTION_LINES_MAX)),
    ("wire.py", function_of(FUNCTION_LINES_MAX).replace("\n", '\n    """A\n\n    docstring.\n    """\n', 1)),
    ("cli.py", "try:\n    pass\nexcept OSError:\n    pass\nexcept Exception as error:\n    print(error)"),
    ("cli.py", "def _f(): ...\nclass _C:\n    def f(self): ...\nre.compile('x')"),
    ("cli.py", "class C:\n    '''C.'''\n    def __init__(self): ...\n    @f.setter\n    def f(self, value): ..."),
]


@pytest.mark.parametrize(("rule", "path", "source"), PLANTED)
def test_planted_violation_is_found(rule: Rule, path: str, source: str) -> None:
    expected = [line for line, text in enumerate(source.splitlines(), start=1) if "#!" in text]
    assert [finding.line for finding in rule(Module(f"messenger/{path}", source))] == expected


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_allowed_code_is_not_found(path: str, source: str) -> None:
    module = Module(f"messenger/{path}", f'"""A module."""\n{source}')
    findings = [(rule.__name__, finding) for rule in RULES for finding in rule(module)]
    assert not findings, report(findings)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_has_a_planted_violation(rule: Rule) -> None:
    assert rule in {planted for planted, _, _ in PLANTED}


@pytest.mark.parametrize(
    "line",
    [
        *("--index-url https:" + "//host/simple", "--extra-index-url x", "--find-links /srv/wheels"),
        *("name @ https:" + "//host/name.whl", "name @ file:/srv/name.whl", "name>=1", "-e /srv/name"),
    ],
)
def test_planted_lock_line_is_found(line: str) -> None:
    assert list(lock_findings(f"good==1.0 \\\n    --hash=sha256:00\n{line}"))
    assert not list(lock_findings("good==1.0 ; sys_platform == 'win32' \\\n    --hash=sha256:00"))
