"""The house's rules: who may import whom, which Python and which versions, and that what is shipped is complete."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from orchestrator.versions import SERIES

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: list[str] = PROJECT["tool"]["setuptools"]["packages"]
SHIPPED = sorted({package.split(".")[0] for package in PACKAGES})
PYTHON = SpecifierSet(PROJECT["project"]["requires-python"])
# Each folder, from the bottom of the house to the top, and what it must not know.
CLUSTER_LIBRARIES = {"ray", "deepspeed", "mlflow"}
FORBIDDEN = {
    "compression": {"models", "orchestrator", "tune_spaces", "tests"} | CLUSTER_LIBRARIES,
    "models": {"orchestrator", "tune_spaces", "tests"} | CLUSTER_LIBRARIES,
    "orchestrator": {"tests"},
    "tune_spaces": {"compression", "models", "orchestrator", "tests"},
}


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path, node: ast.AST) -> Iterator[str]:
    """What an import statement may load: `from a import b` may mean the module a.b as well as a."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = path.relative_to(ROOT).parent.parts
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)


def top_level_statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """What runs when the module is imported; not the bodies of functions, nor what only a type checker reads."""
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            pending += [child for child in getattr(node, field, []) if isinstance(child, ast.stmt)]
        for handler in getattr(node, "handlers", []):
            pending += handler.body


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_run_downwards(folder: str) -> None:
    wrong = []
    for path in python_files(folder):
        for node in ast.walk(ast.parse(path.read_text())):
            roots = {name.split(".")[0] for name in imported_names(path, node)}
            wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in roots & FORBIDDEN[folder]]
    assert wrong == []


def test_models_and_pages_load_without_the_cluster_and_triton_on_demand() -> None:
    """Also through other libraries: a layer can be used where neither Ray nor DeepSpeed nor MLflow is installed."""
    modules = [module_name(path) for folder in ("compression", "models") for path in python_files(folder)]
    assert len(modules) > 10
    code = f"""
import sys
import models.registry, models.scan.selective
print("triton" in sys.modules)
import {", ".join(modules)}
print(sorted({CLUSTER_LIBRARIES | {"orchestrator"}!r} & set(sys.modules)))
import orchestrator.generate, orchestrator.report, orchestrator.sweep_report, orchestrator.comparison_report
print(sorted({CLUSTER_LIBRARIES!r} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.split() == ["False", "[]", "[]"]


def test_nothing_that_is_shipped_reads_a_pickle() -> None:
    """Neither by itself nor through torch or numpy: a checkpoint or a dataset could hold any code."""
    unpicklers = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    wrong, files = [], [path for folder in SHIPPED for path in python_files(folder)]
    assert len(files) > 50
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            parts = {part for name in imported_names(path, node) for part in name.split(".")}
            found = [f"imports {name}" for name in parts & unpicklers]
            if "torch.load" in imported_names(path, node):
                found.append("imports torch.load")
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                found.append("uses torch.load")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                found.append("sets allow_pickle")
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("np.load") and len(node.args) > 2:
                found.append("may set allow_pickle")
            wrong += [f"{path.relative_to(ROOT)} {what}" for what in found]
    assert wrong == []


def test_no_circular_imports() -> None:
    files = {module_name(path): path for folder in FORBIDDEN for path in python_files(folder)}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        statements = top_level_statements(ast.parse(path.read_text()))
        names = {name for node in statements for name in imported_names(path, node)}
        graph[module] = (names & files.keys()) - {module}
    assert any("compression.gramians" in edges for edges in graph.values()), "the graph is empty"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_python_314_is_refused() -> None:
    """It has a standard-library package named `compression`, which ours would shadow in every process."""
    assert "3.14" not in PYTHON
    assert "3.14.1" not in PYTHON
    assert {minor for minor in range(5, 20) if f"3.{minor}" in PYTHON} == {11, 12, 13}
    assert Version(".".join(map(str, sys.version_info[:3]))) in PYTHON


def test_continuous_integration_and_tools_use_a_supported_python() -> None:
    files = [ROOT / "Makefile", *(path for name in (".ci", ".github/workflows") for path in (ROOT / name).rglob("*"))]
    text = "\n".join(path.read_text() for path in files if path.is_file())
    versions = set(re.findall(r"python[-_ a-z:='\"]*(3\.\d+)", text))
    assert versions
    assert {version for version in versions if version not in PYTHON} == set()
    guards = re.findall(r"\((\d), (\d+)\) <= sys\.version_info < \((\d), (\d+)\)", text)
    assert guards
    assert all(SpecifierSet(">={}.{},<{}.{}".format(*guard)) == PYTHON for guard in guards)

    lowest = min(Version(f"3.{minor}") for minor in range(20) if f"3.{minor}" in PYTHON)
    assert PROJECT["tool"]["mypy"]["python_version"] == str(lowest)
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{lowest.major}{lowest.minor}"


def requirements() -> list[Requirement]:
    project = PROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values(), PROJECT["build-system"]["requires"]]
    return [Requirement(line) for group in groups for line in group]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line.split("#")[0].split(";")[0].strip() for line in lines]
    pairs = [line.split("==") for line in pinned if line]
    assert all(len(pair) == 2 for pair in pairs), "every constraint is name==version"
    assert len(pairs) == len({canonicalize_name(name) for name, _ in pairs}), "a name is pinned twice"
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_pinned_versions_satisfy_the_ranges(requirement: Requirement) -> None:
    pinned = pins()
    name = canonicalize_name(requirement.name)
    assert name in pinned, f"{name} has no pin in constraints.txt"
    assert requirement.specifier.contains(pinned[name], prereleases=True)


def test_what_is_required_of_deepspeed_is_what_is_checked() -> None:
    (required,) = [requirement for requirement in requirements() if requirement.name == "deepspeed"]
    assert required.specifier.contains(f"{SERIES}.0")
    assert not required.specifier.contains(f"{Version(SERIES).major}.{Version(SERIES).minor + 1}.0")


@pytest.mark.parametrize("package", PACKAGES)
def test_listed_packages_exist(package: str) -> None:
    folder = ROOT.joinpath(*package.split("."))
    assert (folder / "__init__.py").is_file()
    assert list(folder.glob("*.py"))


def test_every_folder_with_code_is_shipped() -> None:
    tops = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {name.split(".")[0] for name in PACKAGES}
    found = {".".join(path.parent.relative_to(ROOT).parts) for top in tops - {"tests"} for path in python_files(top)}
    assert found == set(PACKAGES)


def test_every_file_that_code_needs_is_shipped() -> None:
    """Files beside the code (templates, kernels) are in the package data, or an installed copy would miss them."""
    patterns: dict[str, list[str]] = PROJECT["tool"]["setuptools"]["package-data"]
    missing = []
    for package in PACKAGES:
        for path in ROOT.joinpath(*package.split(".")).iterdir():
            is_data = path.is_file() and path.suffix not in {".py", ".pyc"} and not path.name.startswith(".")
            if is_data and not any(
                path.match(pattern) for pattern in patterns.get(package, []) + patterns.get("*", [])
            ):
                missing.append(str(path.relative_to(ROOT)))
    assert missing == []


def test_the_command_exists() -> None:
    for target in PROJECT["project"]["scripts"].values():
        module, function = target.split(":")
        tree = ast.parse(ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
