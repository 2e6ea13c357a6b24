"""Imports go one way (docs/ARCHITECTURE.md) and without circles; kernels know torch and Triton alone; importing does
nothing."""

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    "fastft_kernels",
    "fastft.errors",
    "fastft.parsing",
    "fastft.tables",
    "fastft.compat",
    "fastft.swapping",
    "fastft.proving",
    "fastft.patching",
    "fastft.norm",
    "fastft.rotary",
    "fastft.mlp",
    "fastft.linear",
    "fastft.experts",
    "fastft.lm_head",
    "fastft.kinds",
    "fastft.checkpointing",
    "fastft.packing",
    "fastft.graphs",
    "fastft.api",
    "fastft.loading",
    "fastft.tools",
    "fastft.testing",
    "fastft.cli",
    "fastft.__main__",
]
SOURCES = sorted([*ROOT.glob("fastft/**/*.py"), *ROOT.glob("fastft_kernels/**/*.py")])


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(p): p for p in SOURCES}


def imports(tree: ast.AST, module: str, is_package: bool, only_top: bool) -> set[str]:
    """Every dotted name that `module` imports; only_top leaves out imports inside functions."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if only_top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            found.add(base)
            found.update(f"{base}.{a.name}" for a in node.names if f"{base}.{a.name}" in MODULES)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def graph(only_top: bool) -> dict[str, set[str]]:
    return {
        name: imports(ast.parse(path.read_text()), name, path.name == "__init__.py", only_top) - {name}
        for name, path in MODULES.items()
    }


def layer(module: str) -> int | None:
    for i, prefix in enumerate(ORDER):
        if module == prefix or module.startswith(prefix + "."):
            return i
    return None


def backwards(edges: dict[str, set[str]]) -> list[str]:
    return [
        f"{a} -> {b}" for a, bs in edges.items() for b in bs if None not in (layer(a), layer(b)) and layer(b) > layer(a)
    ]


def a_circle(edges: dict[str, set[str]]) -> list[str] | None:
    """One circle of imports, if there is any (a package counts as what its __init__ imports)."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done or node not in edges:
            return None
        for other in sorted(edges[node]):
            if circle := walk(other, [*path, node]):
                return circle
        done.add(node)
        return None

    for node in edges:
        if circle := walk(node, []):
            return circle
    return None


def test_every_module_is_in_a_layer():
    assert [m for m in MODULES if layer(m) is None] == ["fastft"]
    assert len(MODULES) > 20


def test_imports_go_one_way():
    assert backwards(graph(only_top=False)) == []
    assert backwards({"fastft.patching.x": {"fastft.api"}, "fastft_kernels.y": {"fastft.errors"}}) == [
        "fastft.patching.x -> fastft.api",
        "fastft_kernels.y -> fastft.errors",
    ]


def test_no_circles():
    assert a_circle(graph(only_top=False)) is None
    assert a_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


def test_kernels_know_torch_and_triton_alone():
    allowed = {"torch", "triton", "fastft_kernels", *sys.stdlib_module_names}
    for name, names in graph(only_top=False).items():
        if name.startswith("fastft_kernels"):
            assert {n.split(".")[0] for n in names} <= allowed, name


@pytest.mark.parametrize("banned", ["inspect.getsource", "inspect.getsourcelines", "linecache.getline"])
def test_no_source_text_is_read(banned):
    for path in SOURCES:
        assert banned not in path.read_text(), path


def test_no_exec_and_no_environment_switch():
    """No exec or eval of text, and no variable of our own is read from the environment (the launcher's ranks are)."""
    ranks = {"LOCAL_RANK", "RANK", "WORLD_SIZE", "TRITON_INTERPRET"}
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("exec", "eval"), name
            read = None
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv"):
                read = node.args[0]
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                read = node.slice
            if read is not None:
                assert isinstance(read, ast.Constant), (name, ast.unparse(node))
                assert read.value in ranks, (name, ast.unparse(node))


def test_files_are_read_in_one_sitting():
    assert [str(p) for p in SOURCES if len(p.read_text().splitlines()) >= 500] == []


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_fastft_imports_nothing():
    loaded = json.loads(python("import fastft, sys, json; print(json.dumps(sorted(sys.modules)))"))
    heavy = {
        "torch",
        "transformers",
        "peft",
        "trl",
        "accelerate",
        "bitsandbytes",
        "triton",
        "fastft_kernels",
        "rich",
        "typer",
    }
    assert heavy & {m.split(".")[0] for m in loaded} == set()


STATE = """
import gc, json, os, sys, types, warnings
warnings.simplefilter("ignore")
import torch, transformers, peft, trl, accelerate
import trl.trainer.sft_trainer, transformers.models.llama.modeling_llama, peft.tuners.lora.model

def state():
    watched = ("torch", "transformers", "peft", "trl", "accelerate")
    out = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in watched and isinstance(module, types.ModuleType):
            out[name] = {k: id(v) for k, v in vars(module).items()}
            for cls in [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == name]:
                own = {k: v for k, v in vars(cls).items() if not k.startswith(("__", "_abc_"))}
                out[f"{name}:{cls.__qualname__}"] = {k: id(v) for k, v in own.items()}
    return out

def rest():
    return {"seed": torch.random.get_rng_state().tolist(), "grad": torch.is_grad_enabled(),
            "threads": torch.get_num_threads(), "env": dict(os.environ)}

before, others = state(), rest()
PLANTED
import fastft, pkgutil, importlib, fastft_kernels
for package in (fastft, fastft_kernels):
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
after = state()
changed = [f"{m}.{k}" for m in before for k in before[m] if after[m].get(k) != before[m][k]]
# modules may load more lazily, classes not
changed += [f"{m}.{k}" for m in before if ":" in m for k in after[m].keys() - before[m].keys()]
changed += [k for k, v in rest().items() if v != others[k]]
print(json.dumps(changed))
"""


def test_importing_every_module_changes_nothing():
    """Modules and classes of other libraries keep every attribute that they had; so do random stream, threads and
    environment."""
    assert json.loads(python(STATE.replace("PLANTED", ""))) == []


def test_a_change_is_seen():
    plant = (
        "torch.nn.Linear.forward = torch.nn.Linear.fast = lambda self, x: x; torch.rand(1); peft.get_peft_model = None"
    )
    assert json.loads(python(STATE.replace("PLANTED", plant))) == [
        "torch.nn.modules.linear:Linear.forward",
        "peft.get_peft_model",
        "torch.nn.modules.linear:Linear.fast",
        "seed",
    ]


BOTH_ORDERS = """
import importlib, fastft_kernels
first = sys.argv[1] == "function first"
names = [n for n in fastft_kernels.__all__]
functions = {n: getattr(fastft_kernels, n) for n in names} if first else {}
for n in names:
    importlib.import_module(f"fastft_kernels.{fastft_kernels._WHERE[n]}")
assert all(callable(getattr(fastft_kernels, n)) for n in names)
assert all(getattr(fastft_kernels, n) is f for n, f in functions.items())
"""


@pytest.mark.parametrize("order", ["function first", "module first"])
def test_public_functions_are_functions_whatever_was_imported_before(order):
    subprocess.run([sys.executable, "-c", "import sys" + BOTH_ORDERS, order], check=True)


def test_no_class_name_twice():
    names = Counter(
        (node.name, path.parts[0])
        for path in (p.relative_to(ROOT) for p in SOURCES)
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.ClassDef)
    )
    twice = [n for n, count in Counter(name for name, _ in names.elements()).items() if count > 1]
    assert not twice


@pytest.mark.parametrize("package", ["fastft", "fastft_kernels"])
def test_files_and_folders_stay_small(package):
    most = {"fastft": 400, "fastft_kernels": 500}[package]
    lines = {
        str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in SOURCES if p.is_relative_to(ROOT / package)
    }
    assert not {p: n for p, n in lines.items() if n > most}
    folders = Counter(str(Path(p).parent) for p in lines if not p.endswith("__init__.py"))
    assert not {f: n for f, n in folders.items() if n > 12}


# what a module may keep that changes: docs/ARCHITECTURE.md says what each is for
STATE_NAMES = {
    *("CACHE", "_PROVEN", "DTYPES", "_CLASSES", "_MIXINS"),
    *("_ORDERS", "_FUNCTIONS", "LAUNCHERS", "FAKES"),
    *("_FORMULA_ALONE", "_plans", "GIVERS", "REPLAY", "_INSIDE", "_LOCK"),
    "_BFLOAT16",
}
CHANGEABLE = {"dict", "list", "set", "defaultdict", "OrderedDict", "Counter", "ContextVar", "RLock", "Lock", "local"}


def state_of(tree: ast.Module, thread_local: set[str]) -> set[str]:
    """Names at the top of a module that hold nothing yet and can be filled, and what `global` writes."""
    found = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        made = ast.unparse(node.value.func).split(".")[-1] if isinstance(node.value, ast.Call) else ""
        empty = ast.unparse(node.value) in ("{}", "[]") or made.startswith("Weak") or made in CHANGEABLE | thread_local
        if empty and not (made in ("dict", "list", "set") and node.value.args):
            found.update(t.id for t in (node.targets if isinstance(node, ast.Assign) else [node.target]))
    return found


def test_state_of_modules_is_known_by_name():
    trees = [ast.parse(p.read_text()) for p in SOURCES]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    thread_local = {c.name for c in classes if "threading.local" in map(ast.unparse, c.bases)}
    assert set().union(*(state_of(tree, thread_local) for tree in trees)) == STATE_NAMES
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    assert not [name for name in STATE_NAMES if f"`{name}`" not in page]
    planted = "A = {}\nB: set = set()\nC = weakref.WeakSet()\nD = Mine()\nE = (1,)\ndef f():\n    global G\n    x = []"
    assert state_of(ast.parse(planted), {"Mine"}) == set("ABCDG")


def test_frozen_means_frozen():
    assert not [p for p in SOURCES if "object.__setattr__" in p.read_text()]
