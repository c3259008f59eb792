"""The disk that a run's checkpoints go to is full."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chaos.conftest import Told
from tests.chaos.harness import finished
from tests.runs import HANGS_S, assert_same_state, losses, saved

pytestmark = [pytest.mark.cluster, pytest.mark.long]

# In mounts of its own, which end with it: $1 is a disk with room for few checkpoints and then for all, $2 the command,
# $3 the config, and $4 where the disk's content goes.
SMALL_DISK = """
mount -t tmpfs -o size=400k tmpfs "$1" || exit 1
"$2" train "$3"; echo "exit code $?"
mount -o remount,size=64m "$1"
"$2" train "$3"; echo "exit code $?"
cp -r "$1" "$4"
"""


def in_own_mounts(script: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S, check=False)


def test_a_run_whose_disk_is_full_continues_when_there_is_room(
    small_run: dict[str, Any], tmp_path: Path, told: Told
) -> None:
    if in_own_mounts('mount -t tmpfs tmpfs "$1"', tmp_path).returncode:
        pytest.skip("mounting a small disk needs a namespace of its own, which this machine does not give")
    reference = finished(small_run | {"name": "undisturbed"})
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    small_run["checkpoints"]["storage"] = str(disk)
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(small_run))
    with told("ZeRO-2, none; the disk is full, and later has room"):
        done = in_own_mounts(SMALL_DISK, disk, Path(sys.executable).with_name("rayduce"), config, copy)
        first, second, _ = done.stdout.split("exit code ")
        assert (second[:2], done.stdout[-2:]) == ("1\n", "0\n"), done.stdout + done.stderr
        (sentence,) = done.stderr.splitlines()
        assert "cannot be written: No space left on device" in sentence
        assert "started: " in first
        assert re.search(r"continued after step [357]\b", second), second
        folder = Path(small_run["storage"]) / small_run["name"]
        assert losses(folder) == losses(reference)
        assert_same_state(saved(folder, 12, str(copy)), saved(reference, 12))
