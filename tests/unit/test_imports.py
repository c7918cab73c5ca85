"""The rules of the tree, read from the source with `ast`: nothing is imported, nothing is run.

Each rule is a function from (file, source text) to complaints. The last tests feed every rule a snippet that
breaks it, so that a rule which no longer sees anything fails.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

PACKAGE = "megatron_depthattn"
ROOT = Path(__file__).parents[2]

# Files whose mistakes would be silent: functions of integers and shapes, testable without processes. What
# each may import besides the standard library; names inside the package are full module names.
PURE = {
    # one direction: schema, check <- precision, switches, resolve <- checks, hardware_checks; load <- describe
    "config/schema.py": {f"{PACKAGE}.methods", f"{PACKAGE}.config.batch_sizes", f"{PACKAGE}.config.sizes"},
    "config/check.py": set(),
    "config/precision.py": {f"{PACKAGE}.config.schema"},
    "switches.py": {f"{PACKAGE}.config.schema"},
    "config/resolve.py": {f"{PACKAGE}.config.check", f"{PACKAGE}.config.schema"},
    "config/hardware_checks.py": {
        f"{PACKAGE}.{name}" for name in ("config.check", "config.precision", "config.schema", "switches")
    },
    "config/batch_sizes.py": set(),
    "config/sizes.py": set(),
    "config/schedule.py": {f"{PACKAGE}.config.check", f"{PACKAGE}.config.schema"},
    "config/pipeline.py": {f"{PACKAGE}.config.check", f"{PACKAGE}.config.schema"},
    "config/checks.py": {
        *(
            f"{PACKAGE}.config.{name}"
            for name in ("check", "layout_checks", "pipeline", "schedule", "schema", "sizes", "stages")
        ),
        *(f"{PACKAGE}.{name}" for name in ("switches", "methods")),
    },
    "config/layout_checks.py": {
        *(f"{PACKAGE}.config.{name}" for name in ("check", "pipeline", "precision", "schema")),
        f"{PACKAGE}.vocabulary",
    },
    "config/load.py": {"omegaconf", "yaml", *(f"{PACKAGE}.{n}" for n in ("config.check", "config.schema", "durable"))},
    "config/describe.py": {f"{PACKAGE}.config.schema", f"{PACKAGE}.config.load"},
    "vocabulary.py": set(),
    "model/source_plan.py": {"torch"},
    "model/flops.py": {f"{PACKAGE}.model.source_plan", f"{PACKAGE}.methods.definition"},
    "model/activation_memory.py": set(),
    "parallel/payload.py": {"torch", f"{PACKAGE}.model.source_plan"},
    **{
        f"estimate/{name}.py": {
            f"{PACKAGE}.{n}"
            for n in (
                *("config", "switches", "estimate", "methods", "vocabulary"),
                *("model.activation_memory", "model.flops", "model.source_plan"),
            )
        }
        for name in (*("activations", "counts", "hardware", "memory", "step_time", "traffic"),)
    },
    "parallel/rank_spans.py": set(),
    "terminal.py": set(),
    "quiet.py": set(),
    "preflight/report.py": set(),
    "preflight/machine.py": {"torch", f"{PACKAGE}.preflight.report"},  # torch only inside functions
    "preflight/compare.py": {
        f"{PACKAGE}.{n}" for n in ("parallel.launch_env", "parallel.rank_spans", "preflight.report", "switches")
    },
    "data/order.py": {"numpy"},
    "study/report_data.py": {f"{PACKAGE}.train.line_files", f"{PACKAGE}.study.conclusion"},
    "study/plots.py": {"numpy", "matplotlib", f"{PACKAGE}.study.report_data"},
    "study/report.py": {"jinja2", f"{PACKAGE}.study"},
}
STATISTICS = ("law", "bootstrap", "differences", "multiplier", "conclusion", "fit")
PURE |= {
    f"study/{name}.py": {"numpy", "scipy", *(f"{PACKAGE}.study.{other}" for other in STATISTICS)} for name in STATISTICS
}
METHODS = ("denseformer", "attnres", "mhc")
DEFINITIONS = ("definition", "definitions", *(f"{name}.definition" for name in METHODS))
PURE |= {f"methods/{name.replace('.', '/')}.py": {f"{PACKAGE}.methods"} for name in DEFINITIONS}
PURE |= {f"methods/{name}/reference.py": {"torch"} for name in METHODS}
# What a whole folder may import. Triton is torch's own kernel language and comes with it on GPU machines.
ALLOWED_IN_FOLDER = {
    "ops": {"torch", "triton", f"{PACKAGE}.ops"},
    "hf": {
        *("torch", "transformers", "safetensors", f"{PACKAGE}.hf", f"{PACKAGE}.paths"),
        *(f"{PACKAGE}.methods.{n}" for n in DEFINITIONS),
    },
}
FORBIDDEN_IN_FOLDER = {
    folder: {f"{PACKAGE}.train", f"{PACKAGE}.data", f"{PACKAGE}.hf"} for folder in ("model", "methods")
}
DYNAMIC_IMPORTS = ("importlib.import_module", "import_module", "__import__")
NEVER_IN_PACKAGE = {"tools", "launch", "tests"}
PATCHING_FILE = "parallel/cpu_runtime.py"
ENVIRONMENT_FILE = "parallel/launch_env.py"

Rule = Callable[[str, str], list[str]]


def imports(file: str, text: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in the source of package file `file`, wherever it stands.

    `from a import b` yields `a.b`: b may be a module, and a rule about `a` holds for `a.b` as well.
    """
    package = [PACKAGE, *PurePosixPath(file).parts[:-1]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in DYNAMIC_IMPORTS:
            yield from ((node.lineno, str(a.value)) for a in node.args[:1] if isinstance(a, ast.Constant))


def within(module: str, parents: set[str]) -> bool:
    return any(module == parent or module.startswith(parent + ".") for parent in parents)


def only(file: str, text: str, allowed: set[str]) -> list[str]:
    allowed = allowed | set(sys.stdlib_module_names)
    found = [(line, module) for line, module in imports(file, text) if not within(module, allowed)]
    return [f"{file}:{line} imports {module}" for line, module in found]


def rule_pure_files(file: str, text: str) -> list[str]:
    return only(file, text, PURE[file]) if file in PURE else []


def rule_folders(file: str, text: str) -> list[str]:
    folder = file.partition("/")[0]
    complaints = only(file, text, ALLOWED_IN_FOLDER[folder]) if folder in ALLOWED_IN_FOLDER else []
    forbidden = FORBIDDEN_IN_FOLDER.get(folder, set())
    return complaints + [
        f"{file}:{line} imports {module}" for line, module in imports(file, text) if within(module, forbidden)
    ]


def rule_arrows_point_into_the_package(file: str, text: str) -> list[str]:
    return [
        f"{file}:{line} imports {module}" for line, module in imports(file, text) if within(module, NEVER_IN_PACKAGE)
    ]


def rule_package_inits_import_nothing(file: str, text: str) -> list[str]:
    """Importing a pure module runs the `__init__.py` above it: that one must be as pure."""
    return only(file, text, set()) if file == "__init__.py" else []


def rule_no_monkeypatching(file: str, text: str) -> list[str]:
    """Nothing imported from torch or Megatron has an attribute or item set, by assignment or `setattr`."""
    if file == PATCHING_FILE:
        return []
    tree = ast.parse(text)
    foreign: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a for a in node.names if within(a.name, {"torch", "megatron"})]
            foreign |= {a.asname or a.name.partition(".")[0] for a in names}
        elif isinstance(node, ast.ImportFrom) and within(node.module or "", {"torch", "megatron"}) and not node.level:
            foreign |= {a.asname or a.name for a in node.names}
    complaints = []
    for node in ast.walk(tree):
        owner: ast.expr | None = None
        if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            owner = node
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr", "patch.object"):
            owner = node.args[0]
        if owner is None or ast.unparse(owner).startswith("torch.backends."):  # torch's own documented switches
            continue
        root = owner
        while isinstance(root, ast.Attribute | ast.Subscript):
            root = root.value
        if isinstance(root, ast.Name) and root.id in foreign:  # what a function returns is not the library's
            complaints.append(f"{file}:{owner.lineno} sets {ast.unparse(owner)}; only {PATCHING_FILE} patches")
    return complaints


def rule_environment_is_read_in_one_place(file: str, text: str) -> list[str]:
    if file == ENVIRONMENT_FILE:
        return []
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    complaints = []
    for node in ast.walk(ast.parse(text)):
        if (isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "os") or (
            isinstance(node, ast.ImportFrom) and node.module == "os" and names & {a.name for a in node.names}
        ):
            complaints.append(f"{file}:{node.lineno} touches the environment; only {ENVIRONMENT_FILE} does")
    return complaints


RULES: list[Rule] = [
    rule_pure_files,
    rule_folders,
    rule_arrows_point_into_the_package,
    rule_package_inits_import_nothing,
    rule_no_monkeypatching,
    rule_environment_is_read_in_one_place,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    assert files, f"no source found below {ROOT / PACKAGE}"
    complaints = [c for path in files for c in rule(path.relative_to(ROOT / PACKAGE).as_posix(), path.read_text())]
    assert not complaints, "\n" + "\n".join(complaints)


def test_pure_files_exist():
    """A renamed file would silently drop out of the rule that guards it."""
    assert [file for file in PURE if not (ROOT / PACKAGE / file).is_file()] == []


BREAKS = [
    (rule_pure_files, "config/schema.py", "from megatron_depthattn.config import load"),
    (rule_pure_files, "model/source_plan.py", "def f():\n    from megatron.core import parallel_state"),
    (rule_pure_files, "parallel/payload.py", "from ..model.layer import Layer"),
    (rule_pure_files, "parallel/payload.py", "import importlib\nimportlib.import_module('megatron.core')"),
    (rule_folders, "ops/lean.py", "from ..model import source_plan"),
    (rule_folders, "ops/lean.py", "import torchvision"),  # a prefix of a permitted name is another package
    (rule_folders, "hf/modeling.py", "from megatron_depthattn.model import source_plan"),
    (rule_folders, "model/gpt.py", "from ..data.order import order"),
    (rule_folders, "model/gpt.py", "if TYPE_CHECKING:\n    from megatron_depthattn.hf import names"),
    (rule_arrows_point_into_the_package, "train/loop.py", "import tools.prepare_data"),
    (rule_package_inits_import_nothing, "__init__.py", "from .model import gpt"),
    (rule_no_monkeypatching, "model/gpt.py", "import torch\ntorch.cuda.synchronize = lambda: None"),
    (rule_no_monkeypatching, "model/gpt.py", "import torch.cuda as c\nx, c.device = 1, 2"),
    (rule_no_monkeypatching, "model/gpt.py", "from megatron.core import parallel_state as ps\nps._X = 1"),
    (rule_no_monkeypatching, "model/gpt.py", "from torch import Tensor\nsetattr(Tensor, 'cuda', None)"),
    (rule_no_monkeypatching, "model/gpt.py", "from torch import Tensor\ndel Tensor.cuda"),
    (rule_no_monkeypatching, "model/gpt.py", "import torch\ntorch.cuda.table['x'] = 1"),
    (rule_environment_is_read_in_one_place, "train/loop.py", "import os\nos.getenv('RANK')"),
    (rule_environment_is_read_in_one_place, "train/loop.py", "from os import environ"),
]
KEEPS = [
    (rule_pure_files, "config/load.py", "import omegaconf\nfrom megatron_depthattn.config.schema import RunConfig"),
    (rule_pure_files, "model/layer.py", "import megatron.core"),
    (rule_folders, "ops/lean.py", "import math\nimport torch.nn.functional as F\nfrom .reference import depth_mix"),
    (rule_package_inits_import_nothing, "model/__init__.py", "import torch"),
    (rule_no_monkeypatching, PATCHING_FILE, "import torch\ntorch.cuda.synchronize = None"),
    (rule_no_monkeypatching, "train/loop.py", "import torch\ntorch.backends.cuda.matmul.allow_tf32 = True"),
    (rule_no_monkeypatching, "train/loop.py", "import torch\nclass A:\n    def f(self):\n        self.x[torch.a] = 1"),
    (rule_no_monkeypatching, "train/loop.py", "from megatron.core.utils import get_config\nget_config(1).hook = 2"),
    (rule_environment_is_read_in_one_place, ENVIRONMENT_FILE, "import os\nos.environ['RANK']"),
]


def _rule_id(value):
    return value.__name__ if callable(value) else None


@pytest.mark.parametrize(("rule", "file", "snippet"), BREAKS, ids=_rule_id)
def test_control_is_flagged(rule, file, snippet):
    assert rule(file, snippet)


@pytest.mark.parametrize(("rule", "file", "snippet"), KEEPS, ids=_rule_id)
def test_control_passes(rule, file, snippet):
    assert not rule(file, snippet)


def test_every_rule_has_a_control():
    assert {rule for rule, _, _ in BREAKS} == set(RULES)


# ---- no import circle


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Modules of the package that each one imports at module level or in functions, `TYPE_CHECKING` excluded.

    A module counts as an import of itself alone, not of the `__init__` of the packages above it.
    """
    modules = {
        ".".join([PACKAGE, *PurePosixPath(f).with_suffix("").parts]).removesuffix(".__init__"): f for f in sources
    }
    graph = {}
    for module, file in modules.items():
        tree = ast.parse(sources[file])
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                node.body = [ast.Pass()]
        wanted = {name for _, name in imports(file, ast.unparse(ast.fix_missing_locations(tree)))}
        found = {name if name in modules else name.rpartition(".")[0] for name in wanted}
        graph[module] = (found & set(modules)) - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One circle through each module that is on one, found by depth-first search."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for imported in sorted(graph[module]):
                visit(imported, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


def test_no_import_circle():
    folder = ROOT / PACKAGE
    found = circles(import_graph({p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.py")}))
    assert not found, "\n".join(" -> ".join(circle) for circle in found)


def test_a_planted_circle_is_found():
    sources = {
        "a.py": "from megatron_depthattn import b",
        "b.py": "def f():\n    from .c import x",
        "c.py": "from . import a",
    }
    assert circles(import_graph(sources)) == [[f"{PACKAGE}.{name}" for name in "abca"]]
    sources["c.py"] = "if TYPE_CHECKING:\n    from . import a"
    assert not circles(import_graph(sources))
