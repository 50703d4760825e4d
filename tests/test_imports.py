"""Import rules of the top-level packages: allowed imports between them, and their third-party dependencies."""

import ast
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Packages of a training machine; their dependencies are added.
TRAINING = ["torch", "torchvision", "numpy", "pyarrow", "pydantic", "pyyaml", "safetensors", "rich", "jinja2", "pillow"]
# Packages on the GPU machine of docs/gpu.md: installed before, and installed from the folder of gpu_pack.sh.
GPU_MACHINE = [
    *("torch", "torchvision", "timm", "numpy", "pyarrow", "pillow", "onnx", "safetensors", "rich", "pytest", "pyyaml"),
    *("pydantic", "psutil", "ruamel.yaml", "hypothesis"),
]
NEEDS_MORE = {
    "pipeline.export",
    "pipeline.onnx_export.added_class",
    "pipeline.onnx_export.float16",
    "pipeline.onnx_export.larger_release",
    "pipeline.onnx_export.parity",
    "pipeline.onnx_export.release",
}
NEED_MORE = ("pipeline.commands.", "pipeline.doctor.", "pipeline.flows.", "pipeline.scheduling.")  # typer, Prefect, DVC

# Hides every package outside TRAINING and its dependencies, then imports the modules one after another.
BARE_MACHINE = """
import importlib, importlib.abc, importlib.metadata, json, re, sys
allowed, modules = json.loads(sys.argv[1]), json.loads(sys.argv[2])
def name_of(text):
    return re.sub(r"[-_.]+", "-", re.match(r"[\\w.-]+", text)[0]).lower()
pending, carried = [name_of(name) for name in allowed], set()
while pending:
    name = pending.pop()
    if name in carried:
        continue
    carried.add(name)
    try:
        needed = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        continue
    pending += [name_of(text) for text in needed if "extra ==" not in text]
owners = importlib.metadata.packages_distributions()
hidden = {top for top, by in owners.items() if not {name_of(name) for name in by} & (carried | {"setuptools"})}
hidden -= {"models", "pipeline", "serving", "tailor"}
if "torch" in carried:
    import torch._dynamo  # it searches for packages without importing them, which would raise here
class Bare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r} on this machine", name=name)
sys.meta_path.insert(0, Bare())
failed = {}
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as error:
        failed[module] = str(error)
print(json.dumps({"failed": failed, "hidden": sorted(hidden)}))
"""

LOADED = """
import importlib, json, sys
for module in json.loads(sys.argv[1]):
    importlib.import_module(module)
print(json.dumps(sorted(sys.modules)))
"""


def test_no_child_process_imports_from_the_working_folder():
    """`python -m` puts the working folder first on the path: a user's `models.py` there would shadow Tailor's."""
    sources = [path for room in ("models", "pipeline", "serving", "tailor") for path in (ROOT / room).rglob("*.py")]
    options = {path: re.findall(r'sys\.executable,\s*"([^"]+)"', path.read_text(encoding="utf-8")) for path in sources}
    assert sum(map(len, options.values())) >= 9
    assert {path.name: first for path, first in options.items() if not {"-P", "-I"}.issuperset(first)} == {}


def modules_of(room):
    """Return the modules of a package and its subpackages, except those that run only in Triton or on import."""
    modules = [room]
    for entry in pkgutil.iter_modules([ROOT / room.replace(".", "/")]):
        name = f"{room}.{entry.name}"
        # Locust patches the standard library on import, so it must be imported first in a separate process.
        if name not in ("serving.triton", "serving.loadtest.locustfile") and entry.name != "__main__":
            modules += modules_of(name) if entry.ispkg else [name]
    return modules


def run_program(program, *arguments):
    texts = [json.dumps(argument) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-c", program, *texts], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_import_contracts_hold():
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.slow
def test_models_and_training_stages_import_with_only_the_training_packages():
    modules = [module for room in ("models", "pipeline") for module in modules_of(room)]
    modules = [module for module in modules if module not in NEEDS_MORE and not module.startswith(NEED_MORE)]
    result = run_program(BARE_MACHINE, TRAINING, modules)
    assert result["failed"] == {}
    # Packages of the other rooms are installed, but hidden.
    assert {"sklearn", "timm", "onnx", "onnxruntime", "dvc", "prefect", "tritonclient", "typer"} <= set(
        result["hidden"]
    )


@pytest.mark.slow
def test_the_gpu_benchmark_and_the_tests_it_runs_import_with_the_packages_of_its_machine():
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if "@pytest.mark.gpu" in path.read_text("utf-8")]
    assert len(tests) >= 2
    modules = [
        "benchmarks.gpu",
        "benchmarks.gpu_encoders",
        "benchmarks.gpu_runs",
        "benchmarks.gpu_speed",
        "ruamel.yaml",
        "tests.conftest",
    ]
    modules += [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in tests]
    result = run_program(BARE_MACHINE, GPU_MACHINE, modules)
    assert result["failed"] == {}
    assert {"scipy", "sklearn", "dvc", "typer", "onnxruntime"} <= set(result["hidden"])
    page = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    assert f"--target gpu_pack/site {' '.join(GPU_MACHINE[-4:])}" in page
    assert " ".join(GPU_MACHINE[-4:]) in (ROOT / "benchmarks/gpu_pack.sh").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "modules",
    [["models.prior", "models.preprocess"], modules_of("serving"), ["serving.loadtest.locustfile"]],
    ids=["shared", "serving", "load"],
)
def test_serving_loads_neither_torch_nor_the_pipeline(modules):
    loaded = run_program(LOADED, modules)
    assert {"torch", "torchvision", "timm", "pipeline", "dvc"}.isdisjoint(loaded)
    assert modules[-1] in loaded


def test_packages_modules_and_functions_keep_within_their_limits():
    """Most modules of a package, lines of a module and of a function; lower a figure when its largest entry shrinks.

    Of a function, its statements count: options of a command and the docstring do not.
    """
    sizes = {"modules": 12, "lines": 364, "function": 58}
    over = []
    for room in ("models", "pipeline", "serving", "tailor"):
        for package in {path.parent for path in (ROOT / room).rglob("__init__.py")}:
            if sum(not path.name.startswith("__") for path in package.glob("*.py")) > sizes["modules"]:
                over.append(str(package))
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if len(text.splitlines()) > sizes["lines"]:
                over.append(str(path))
            functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
            for function in functions:
                first = function.body[1 if ast.get_docstring(function) and len(function.body) > 1 else 0]
                if function.end_lineno - first.lineno >= sizes["function"]:
                    over.append(f"{path}: {function.name}")
    assert over == []
