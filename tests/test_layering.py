"""The house keeps its floors: who may import whom, what an import may cost, and one test command.

Knows the source as text and syntax trees. Imports nothing of Trimtab, except in subprocesses.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "trimtab"

FLOORS = [
    {"errors", "place", "edits", "adapter", "merge", "recording", "artifact", "journal"}
    | {"solvers", "inductor", "products"},
    {"anatomy", "taps"},
    {"chat", "models", "lm", "decode", "harvest", "compiled", "remote"} | {"writer", "cache"},
    {"concepts", "selfcontrol", "prefix", "latentqa"},
    {"data", "evals"},
    {"cli", "server", "web", "vllm", "gguf", "hub", "__main__"},
]
METHODS, TOP = 3, 5
NEEDS_FLOOR_2 = {"transformers", "peft", "accelerate", "huggingface_hub", "tokenizers"}
# The public names and the command line tie everything together, but only when they are called.
DOORS = {"", "cli", "__main__"}
SLOW = {"torch", "transformers", "peft", "datasets", "sklearn", "gradio", "fastapi"}


@dataclass(frozen=True)
class Import:
    """One import: of `target`, from module `by`; `lazy` inside a function, `typing` never run."""

    by: str
    target: str  # dotted; "trimtab" alone is the public package
    line: int
    lazy: bool
    typing: bool

    @property
    def home(self) -> str:
        """The file or package on a floor that the import stands in."""
        return unit(self.by)

    @property
    def goal(self) -> str | None:
        """The file or package on a floor that is imported; None for other people's packages."""
        return unit(self.target) if self.target.split(".")[0] == "trimtab" else None


def unit(module: str) -> str:
    """`trimtab.latentqa.train` is part of `latentqa`; the package itself is ''."""
    return [*module.split("."), ""][1]


def floor(name: str) -> int | None:
    return next((i for i, names in enumerate(FLOORS) if name in names), None)


def imports_of(source: str, module: str, *, package: bool = False) -> Iterator[Import]:
    """Every import of a source text, relative ones resolved."""
    base = module.split(".") if package else module.split(".")[:-1]

    def visit(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = base[: len(base) - node.level + 1] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            # `from trimtab import place` means the module, `from trimtab import LM` the package.
            targets = [f"{origin}.{alias.name}" for alias in node.names if origin == "trimtab"]
            targets = [t if floor(unit(t)) is not None else "trimtab" for t in targets] or [origin]
        for target in targets:
            yield Import(module, target, node.lineno, lazy, typing)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, lazy, True)
            for child in node.orelse:
                yield from visit(child, lazy, typing)
            return
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy, typing)

    yield from visit(ast.parse(source), False, False)


def violations(imports: list[Import]) -> list[str]:
    """What breaks the rules of the floors, one line each."""
    found = [f"{i.by}:{i.line} imports {i.target}: {why}" for i in imports if (why := wrong(i))]
    return found + [f"a circle on one floor: {' -> '.join(path)}" for path in circles(imports)]


def wrong(i: Import) -> str | None:
    if i.home in DOORS:
        slow = i.target.split(".")[0] in SLOW and not i.lazy and not i.typing
        return "slow to import, so only inside a function" if slow else None
    here = floor(i.home)
    if here is None:
        return f"{i.home!r} is on no floor: add it to FLOORS and to the design"
    if i.goal is None:
        outside = i.target.split(".")[0]
        early = here < 2 and outside in NEEDS_FLOOR_2 and not i.typing
        return f"floor {here} works without {outside}" if early else None
    if i.goal == i.home:
        return None
    if i.goal == "":
        return None if here == TOP else "the public package stands above every floor but the last"
    there = floor(i.goal)
    if there is None:
        return f"{i.goal!r} is on no floor"
    if there == TOP:
        return "nothing imports the last floor"
    if there > here:
        return f"floor {here} imports floor {there}"
    return "no method imports another" if here == there == METHODS else None


def circles(imports: list[Import]) -> list[list[str]]:
    """Neighbours on a floor may build on each other, but never in a circle."""
    edges: dict[str, set[str]] = {}
    for i in imports:
        if i.goal and i.goal != i.home and i.home not in DOORS and not i.typing:
            edges.setdefault(i.home, set()).add(i.goal)

    def walk(path: list[str]) -> Iterator[list[str]]:
        for goal in sorted(edges.get(path[-1], ())):
            if goal == path[0]:
                yield [*path, goal]
            elif goal > path[0] and goal not in path:  # each circle once, from its first name
                yield from walk([*path, goal])

    return [circle for start in sorted(edges) for circle in walk([start])]


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def all_imports() -> list[Import]:
    found: list[Import] = []
    for file in source_files():
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if package else parts)
        found += imports_of(file.read_text(encoding="utf-8"), module, package=package)
    return found


# ---- floors -------------------------------------------------------------------------------------


def test_every_module_keeps_to_its_floor():
    assert violations(all_imports()) == []


def test_there_is_something_to_check():
    names = {i.home for i in all_imports()}
    assert {"place", "edits", "models"} <= names
    assert len(source_files()) > 5


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("trimtab.place", "from trimtab.lm import LM"),
        ("trimtab.place", "def f():\n    from trimtab.lm import LM"),
        ("trimtab.place", "def f():\n    if x:\n        import trimtab.taps as t"),
        ("trimtab.place", "from .taps import Taps"),
        ("trimtab.place", "from . import taps"),
        ("trimtab.edits", "from trimtab import LM"),
        ("trimtab.edits", "import trimtab as tt"),
        ("trimtab.edits", "import transformers"),
        ("trimtab.edits", "def f():\n    from transformers import AutoModel"),
        ("trimtab.taps", "from peft import PeftModel"),
        ("trimtab.concepts", "from trimtab.selfcontrol import Judge"),
        ("trimtab.latentqa.train", "from ..prefix import distill"),
        ("trimtab.lm", "import trimtab.gguf"),
        ("trimtab.server.app", "from trimtab.cli import main"),
        ("trimtab.evals.pnes", "from trimtab.server import app"),
        ("trimtab.newcomer", "import torch"),
        ("trimtab.lm", "from trimtab.newcomer import x"),
        ("trimtab.cli", "import torch"),
        ("trimtab.cli.demo", "import torch"),
        ("trimtab.server.app", "from trimtab.cli.screen import bars"),
        ("trimtab", "from transformers import AutoModel"),
    ],
)
def test_control_a_violation_is_caught(module, source):
    package = module == "trimtab"
    assert len(violations(list(imports_of(source, module, package=package)))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("trimtab.edits", "from trimtab.place import Place\nimport torch"),
        ("trimtab.lm", "from trimtab import chat, models"),
        ("trimtab.latentqa.train", "from trimtab.latentqa.reader import Reader\nfrom .x import y"),
        ("trimtab.evals.sweeps", "from trimtab.concepts import Probe\nfrom trimtab import data"),
        ("trimtab.server.app", "from trimtab import LM"),
        ("trimtab.cli", "def f():\n    import torch\n    from trimtab.server import app"),
        ("trimtab.cli.chat", "from trimtab.cli import demo\nfrom trimtab.cli.screen import bars"),
        ("trimtab", "if TYPE_CHECKING:\n    import torch"),
        ("trimtab.place", "if TYPE_CHECKING:\n    from transformers import PreTrainedModel"),
    ],
)
def test_control_what_is_allowed_passes(module, source):
    package = module == "trimtab"
    assert violations(list(imports_of(source, module, package=package))) == []


def test_control_a_circle_on_one_floor_is_caught():
    there = list(imports_of("from trimtab.place import Place", "trimtab.edits"))
    back = list(imports_of("def f():\n    import trimtab.edits", "trimtab.place"))
    assert violations(there) == violations(back) == []
    assert violations(there + back) == ["a circle on one floor: edits -> place -> edits"]


# ---- what an import costs -----------------------------------------------------------------------

SHOW_HELP = """
import sys
from trimtab.cli import main
sys.argv = ["trimtab", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


def slow_modules_after(code: str) -> list[str]:
    """Which slow packages a fresh interpreter has loaded after running `code`."""
    tail = f"\nimport sys\nprint('LOADED', *sorted({SLOW!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1].split()[1:]


def test_importing_trimtab_loads_nothing_slow():
    assert slow_modules_after("import trimtab") == []


def test_help_loads_nothing_slow():
    assert slow_modules_after(SHOW_HELP) == []


@pytest.mark.slow
def test_control_a_slow_import_is_seen():
    assert "torch" in slow_modules_after("import trimtab.place")


# ---- files --------------------------------------------------------------------------------------

# Put together here, so that this file does not contain them itself.
MACHINE_PATHS = re.compile(
    "|".join(
        "/" + rest for rest in (r"work/", r"root/", r"home/\w", r"Users/\w", r"opt/\w", r"tmp/w/")
    )
)
REGISTRY_HOSTS = re.compile("|".join((r"pypi\." + "org", "python" + r"hosted\.org")))


def tracked_files() -> list[Path]:
    """Everything that git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def text_of(path: Path) -> str:
    raw = path.read_bytes()
    return "" if b"\0" in raw[:8192] else raw.decode("utf-8", errors="replace")


@pytest.mark.parametrize("pattern", [MACHINE_PATHS, REGISTRY_HOSTS])
def test_no_file_names_one_machine(pattern):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked_files()
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_control_a_machine_path_is_seen():
    assert MACHINE_PATHS.search("open('" + "/home" + "/ada/x')")
    assert not MACHINE_PATHS.search("src/homework/home.py and a/b")
    assert REGISTRY_HOSTS.search("https://" + "pypi" + ".org/simple")


def test_typed_and_licensed():
    assert (PACKAGE / "py.typed").exists()
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


# ---- one test command ---------------------------------------------------------------------------


def fenced_after(marker: str, text: str) -> str:
    """The first fenced block after an HTML comment on a line of its own."""
    found = re.search(
        rf"^<!-- {re.escape(marker)} -->\s*^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL
    )
    assert found, f"README.md has no fenced block after <!-- {marker} -->"
    return found[1].strip()


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_command_of_the_readme():
    shown = subprocess.run(
        ["bash", ".ci/run", "--print"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert shown.stdout.strip() == fenced_after("test-command", readme())


def test_commands_of_the_readme_are_pinned_and_complete():
    test, demo = (fenced_after(name, readme()) for name in ("test-command", "demo-command"))
    assert "-c constraints.txt" in test
    assert "-c constraints.txt" in demo
    assert ".venv-test" in test  # what .ci/run removes first
    assert test.endswith("./check")
    assert demo.endswith("trimtab demo")


def test_check_runs_all_four():
    script = (ROOT / "check").read_text()
    for tool in ("ruff check", "ruff format --check", "mypy", "pytest"):
        assert f"python -m {tool}" in script
    # The closing line of pytest is the last thing that is printed.
    assert script.strip().splitlines()[-1].startswith("python -m pytest")
