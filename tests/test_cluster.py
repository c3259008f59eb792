"""cluster.yaml, judged by Ray's own code, and .rayignore, judged by the two programs that read it."""

import ast
import copy
import itertools
import os
import re
import shlex
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from packaging.specifiers import SpecifierSet
from ray._private.runtime_env.packaging import create_package, get_excludes_from_ignore_files
from ray.autoscaler._private.command_runner import SSHCommandRunner
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "cluster.yaml").read_text()
LOOPBACK = "127.0.0.1"


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    """The file as `ray up` sees it: Ray's AWS defaults fill what it leaves out."""
    return prepare_config(yaml.safe_load(TEXT))


@pytest.fixture(scope="module")
def commands(cluster: dict[str, Any]) -> list[str]:
    lists = [value for key, value in cluster.items() if key.endswith("_commands")]
    return list(dict.fromkeys(itertools.chain(*lists)))


def only(commands: list[str], containing: str) -> str:
    found = [command for command in commands if containing in command]
    assert len(found) == 1, f"{len(found)} commands contain {containing!r}"
    return found[0]


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    validate_config(copy.deepcopy(cluster))


def test_gpus_come_with_demand_and_the_head_is_never_reclaimed(cluster: dict[str, Any]) -> None:
    nodes = dict(cluster["available_node_types"])
    head = nodes.pop(cluster["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]
    assert nodes
    assert all(node["min_workers"] == 0 < node["max_workers"] for node in nodes.values())


def test_nothing_listens_on_every_interface(commands: list[str]) -> None:
    """Ray's AWS defaults open the dashboard to all interfaces, so a forgotten option must fail here."""
    assert not [command for command in commands if re.search(r"(?<!\d)0\.0\.0\.0", command)]
    assert set(re.findall(r"host[= ](\S+)", "\n".join(commands))) == {LOOPBACK}
    assert f"--dashboard-host={LOOPBACK} " in only(commands, "ray start --head")
    assert f"--host {LOOPBACK} " in only(commands, "mlflow server")


def test_rays_security_group_lets_in_only_ssh(cluster: dict[str, Any]) -> None:
    """boto3 is no dependency of ours, so the rules are cut out of Ray's source instead of imported."""
    source = Path(ray.__file__).parent / "autoscaler/_private/aws/config.py"
    functions = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)]
    rules: list[ast.stmt] = [node for node in functions if re.fullmatch(r"_create_default_\w*inbound_rules", node.name)]
    scope: dict[str, Any] = {"itertools": itertools}
    exec(compile(ast.Module(rules, []), source, "exec"), scope)
    opened = scope["_create_default_inbound_rules"]({"own"})

    outside = [rule for rule in opened if "UserIdGroupPairs" not in rule]
    inside = [rule["UserIdGroupPairs"] for rule in opened if "UserIdGroupPairs" in rule]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in outside] == [(22, 22)]
    assert inside == [[{"GroupId": "own"}]]
    assert "security_group" not in cluster["provider"]
    for node in cluster["available_node_types"].values():
        assert not {"SecurityGroupIds", "NetworkInterfaces", "LaunchTemplate"} & set(node["node_config"])


def test_versions_are_those_of_constraints(commands: list[str]) -> None:
    installs = [command for command in commands if "pip install" in command]
    assert installs
    assert all("cd ~/rayduce && pip install -c constraints.txt " in command for command in installs)

    constraints = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins = dict(re.findall(r"([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)", TEXT))
    assert {"ray", "torch", "deepspeed", "mlflow"} <= set(constraints)
    assert "ray" in pins
    assert pins == {name: constraints.get(name) for name in pins}


def test_extras_and_python_are_the_projects(commands: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = "\n".join(commands)
    extras = {extra for group in re.findall(r"-e '?\.\[([\w,]+)\]", text) for extra in group.split(",")}
    assert extras
    assert extras <= set(project["optional-dependencies"])
    pythons = set(re.findall(r"python(3\.\d+)", text))
    assert len(pythons) == 1
    assert pythons.pop() in SpecifierSet(project["requires-python"])


def test_commands_are_valid_shell(commands: list[str]) -> None:
    for command in commands:
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, f"{command}\n{checked.stderr}"


def test_the_driver_is_told_where_mlflow_listens(commands: list[str], tmp_path: Path) -> None:
    """Runs the setup command that writes the address, and reads it back as a login shell would."""
    script = f"{only(commands, 'MLFLOW_TRACKING_URI=')}; source ~/.rayduce; env"
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    told = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    server = shlex.split(only(commands, "mlflow server"))
    address = f"http://{LOOPBACK}:{server[server.index('--port') + 1]}"
    assert f"MLFLOW_TRACKING_URI={address}" in told.stdout.splitlines()


def test_what_must_last_has_an_absolute_path_that_all_nodes_share(commands: list[str]) -> None:
    server = shlex.split(only(commands, "mlflow server"))
    assert server[server.index("--backend-store-uri") + 1].startswith("sqlite:////")
    assert server[server.index("--artifacts-destination") + 1].startswith("/")

    (exported,) = re.findall(r"echo '(/\S+) ", only(commands, "/etc/exports.d"))
    assert f"$RAY_HEAD_IP:{exported} {exported}" in only(commands, "mount -t nfs4")
    linked = re.findall(r"ln -sfn (\S+) ~/rayduce/(\w+)", only(commands, "ln -sfn"))
    assert dict(linked) == {f"{exported}/{name}": name for name in ("runs", "data")}


TRAVELS = {
    ".rayignore",
    "constraints.txt",
    "pyproject.toml",
    "configs/quickstart.yaml",
    "models/scan/kernel.cpp",
    "orchestrator/data/arrow.py",
    "orchestrator/report.html.j2",
}
STAYS = {
    ".git/config",
    ".venv/bin/python",
    "build/lib/models/lru.py",
    "data/text/part.bin",
    "models/__pycache__/lru.cpython-312.pyc",
    "rayduce.egg-info/PKG-INFO",
    "runs/first/checkpoint/shard.safetensors",
    "tests/train.arrow",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    for name in TRAVELS | STAYS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    shutil.copy(ROOT / ".rayignore", folder)
    return folder


def test_ray_packages_the_code_and_leaves_the_rest(project: Path, tmp_path: Path) -> None:
    package = tmp_path / "package.zip"
    create_package(str(project), package, include_gitignore=False)
    assert set(zipfile.ZipFile(package).namelist()) == TRAVELS


def test_ray_does_not_walk_through_large_folders(project: Path) -> None:
    excludes = get_excludes_from_ignore_files(project, include_gitignore=False)
    folders = [project / name for name in (".git", ".venv", "build", "data", "runs")]
    assert [folder for folder in folders if not any(exclude(folder) for exclude in excludes)] == []


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
def test_rsync_leaves_the_same_files_at_home(project: Path, cluster: dict[str, Any], tmp_path: Path) -> None:
    """With the arguments Ray makes of the file. A node's own link to its runs must stay there as well."""
    shutil.rmtree(project / "runs")
    (project / "runs").symlink_to(tmp_path)
    filters = SSHCommandRunner._create_rsync_filter_args(None, cluster)
    node = tmp_path / "node"
    subprocess.run(["rsync", "-a", *filters, f"{project}/", f"{node}/"], check=True)
    arrived = {str(path.relative_to(node)) for path in node.rglob("*") if path.is_symlink() or path.is_file()}
    assert arrived == TRAVELS
