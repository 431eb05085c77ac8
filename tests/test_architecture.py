"""The house rules, read from the code: direction of imports, who imports torch and simpy, what the wheel holds."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ["traces", "predictors", "sim", "backend", "cli"]
TORCH = {"torch", "transformers"}


def modules(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path, *, lazy_too=True):
    """Names of the modules that a file imports; without `lazy_too` only those imported when it is."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {node for function in functions for node in ast.walk(function)}
    found = set()
    for node in ast.walk(tree):
        if node in inside and not lazy_too:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("folder", ORDER)
def test_imports_point_one_way(folder):
    later = {f"moesim.{name}" for name in ORDER[ORDER.index(folder) + 1 :]}
    for path in modules(folder):
        wrong = [name for name in imports(path) if any(name == f or name.startswith(f + ".") for f in later)]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


MAY_IMPORT_TORCH = ("backend/", "predictors/learned/", "traces/adapters/", "traces/record.py", "traces/routers.py")
MAY_IMPORT_TORCH_LAZILY = ("traces/formats/torch_files.py",)


def test_only_recording_learned_predictors_and_backend_import_torch():
    for folder in ORDER:
        for path in modules(folder):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(MAY_IMPORT_TORCH):
                found = imports(path, lazy_too=not name.startswith(MAY_IMPORT_TORCH_LAZILY))
                roots = {module.split(".")[0] for module in found}
                assert not roots & TORCH, f"{name} imports {roots & TORCH}"


def test_only_the_engine_imports_simpy():
    users = [p.relative_to(ROOT).as_posix() for f in ORDER for p in modules(f) if "simpy" in imports(p)]
    assert users == ["sim/contention.py", "sim/engine.py", "sim/station.py"]


def test_nothing_unpickles():
    for folder in ORDER:
        for path in modules(folder):
            text = path.read_text(encoding="utf-8")
            assert not imports(path) & {"pickle", "joblib", "shelve", "marshal", "dill"}, path.name
            for word in ("allow_pickle=True", "all_gather_object", "broadcast_object_list", "weights_only=False"):
                assert word not in text, f"{path.relative_to(ROOT)} uses {word}"


@pytest.mark.parametrize(
    "code",
    [
        "import moesim.sim, moesim.sim.engine, moesim.sim.policies, moesim.predictors, moesim.traces.store",
        "from moesim.cli.main import main; main.get_command(None, 'simulate')",
        "from moesim.cli.main import main; main.get_command(None, 'compare')",
    ],
)
def test_simulating_starts_without_torch(code):
    check = code + "; import sys; assert not {'torch', 'transformers'} & sys.modules.keys(), 'torch was imported'"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT / "tests")


def test_the_packages_listed_are_the_packages_there():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(setup["tool"]["setuptools"]["packages"])
    there = {
        "moesim." + path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for folder in ORDER
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert listed == there
    assert set(setup["tool"]["setuptools"]["package-dir"]) == {f"moesim.{name}" for name in ORDER}
    assert all((ROOT / folder / "py.typed").exists() for folder in ORDER)


def test_the_wheel_holds_every_module_and_profile(tmp_path):
    source = tmp_path / "source"
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    for name in listed:
        if name.startswith((*(f + "/" for f in ORDER), "pyproject.toml", "README.md", "LICENSE")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"moesim/{n}" for n in listed if n.split("/")[0] in ORDER and n.endswith((".py", ".json", "py.typed"))}
    assert expected <= inside, f"missing: {sorted(expected - inside)[:5]}"
    assert not [n for n in inside if n.startswith("moesim/") and n not in expected]


def test_files_stay_short():
    long = {
        str(p.relative_to(ROOT)): n
        for f in [*ORDER, "tests", "benchmarks"]
        for p in modules(f)
        if (n := len(p.read_text(encoding="utf-8").splitlines())) > 360
    }
    assert not long
