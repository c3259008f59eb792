"""Checkpoints: complete or absent whatever happens, equal after a restore on any number of workers, kept as told.

Every worker here is a writer of its own; the storage is a real folder, and an S3 server.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import random
import shutil
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from orchestrator import checkpoint, launch, retention
from orchestrator.checkpoint import MANIFEST, CheckpointError
from orchestrator.checkpoint_writer import MissingShardError, Writer
from orchestrator.config import CheckpointsConfig, ClusterConfig
from orchestrator.config_reading import parse_config
from orchestrator.errors import TrainingError, UserError
from orchestrator.filesystem import Folder, inside
from orchestrator.group import Group
from orchestrator.guard import Watch
from orchestrator.retention import kept, prune
from orchestrator.storage import checkpoints_of, run_folder
from tests.checkpoints import (
    CPU,
    OTHER,
    SHAPES,
    TOKEN,
    equal,
    manifest,
    restored,
    save_for_ever,
    save_much,
    share,
    states,
    write,
    write_with_room_for,
)
from tests.runs import dims_loaded_alone, train, wait_until
from tests.s3 import Server


@pytest.fixture(params=["path", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """A place for checkpoints, new to every test."""
    uri = tmp_path if request.param == "path" else request.getfixturevalue("s3").uri
    place = Folder.of(uri, "place") / f"checkpoints-of-{tmp_path.name}"
    place.create()
    return place


def test_a_folder_may_be_a_uri(tmp_path: Path) -> None:
    Folder.of(f"file://{tmp_path}", "place").write("name", b"content")
    assert Folder.of(tmp_path, "place").read("name") == b"content"
    assert Folder.of(f"file://{tmp_path}", "place").is_local


# --- complete or absent ---


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_restore_equals_what_was_saved_on_any_number_of_workers(folder: Folder, workers: int) -> None:
    path = write(folder, 5, workers, val_loss=math.nan)
    assert checkpoint.newest(folder) == path
    for readers in (1, 2, 3):
        assert equal(restored(path, readers), states(0))
    values = checkpoint.load_values(path, checkpoint.verify(path))
    assert all(torch.equal(values[name], state.value) for name, state in states(0).items())
    files = {shard.file for shard in checkpoint.verify(path).shards}
    assert set(path.names()) == {MANIFEST} | files, "nothing else is left"


def test_it_is_absent_until_every_rank_has_written(folder: Folder) -> None:
    """Whatever earlier attempts have left in the same place, digests included."""
    path, whole = checkpoint.at(folder, 5), states(0)
    Writer(1, 2, 30).save(path, OTHER, manifest(5, 2), share(states(1), 1, 2))
    first, second = Writer(0, 2, 30), Writer(1, 2, 30)
    announced = threading.Event()
    first.save(path, TOKEN, manifest(5, 2), share(whole, 0, 2), after=announced.set)
    time.sleep(0.3)
    first.check()
    assert checkpoint.newest(folder) is None
    assert not announced.is_set()
    second.save(path, TOKEN, manifest(5, 2), share(whole, 1, 2))
    first.wait()
    assert announced.is_set()
    assert equal(restored(path), whole)


def test_a_rank_that_never_writes_is_named(folder: Folder) -> None:
    writer = Writer(0, 2, timeout_s=0.1)
    writer.save(checkpoint.at(folder, 5), TOKEN, manifest(5, 2), share(states(0), 0, 2))
    with pytest.raises(MissingShardError, match=r"still lacks shard-00001-of-00002-\w+\.safetensors after 0\.1 s"):
        writer.wait()
    assert checkpoint.newest(folder) is None


def test_a_step_that_is_saved_again_has_one_of_both_at_every_moment(folder: Folder) -> None:
    path = write(folder, 5, seed=1)
    straggler = Writer(0, 2, timeout_s=1)  # its other rank is dead
    straggler.save(path, OTHER, manifest(5, 2), share(states(2), 0, 2))
    time.sleep(0.2)
    assert equal(restored(path), states(1))
    write(folder, 5, token=OTHER, workers=3)
    assert equal(restored(path), states(0))


def test_a_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    context, place = multiprocessing.get_context("forkserver"), Folder.of(tmp_path, "place")
    context.set_forkserver_preload(["tests.checkpoints"])
    last = 0
    for attempt in range(6):
        process = context.Process(target=save_for_ever, args=(tmp_path,))
        process.start()
        deadline = time.monotonic() + 60
        while (path := checkpoint.newest(place)) is None or path.name == f"step-{last:08d}":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.Random(attempt).random() / 20)
        process.kill()
        process.join()
        path = checkpoint.newest(place)
        assert path is not None
        last = checkpoint.verify(path).step
        assert equal(restored(path), states(last))


def test_a_kill_in_the_middle_of_an_upload_leaves_the_checkpoint_before(s3: Server) -> None:
    """Some parts of a shard are in the store, which knows of no such file; the same step is saved again later."""
    uri = s3.uri.replace("checkpoints?", "uploads?")
    place = Folder.of(uri, "place")
    before = write(place, 4)
    credentials = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    process = multiprocessing.get_context("spawn").Process(target=save_much, args=(uri, credentials))
    process.start()
    wait_until(lambda: s3.parts() or not process.is_alive(), "a part has arrived")
    process.kill()
    process.join()
    assert s3.parts(), "the upload had ended before the kill"
    assert checkpoint.newest(place) == before
    assert checkpoint.at(place, 5).names() == []
    assert equal(restored(write(place, 5, seed=1)), states(1))


# --- in the background ---


def test_errors_of_the_thread_surface_and_the_next_save_waits(folder: Folder) -> None:
    writer, order = Writer(0, 1, 30), []

    def fails() -> None:
        time.sleep(0.2)
        order.append("first")
        raise ValueError("what follows")

    writer.save(checkpoint.at(folder, 1), TOKEN, manifest(1), share(states(0), 0, 1), after=fails)
    writer.check()
    assert order == []
    with pytest.raises(ValueError, match="what follows"):
        writer.save(checkpoint.at(folder, 2), TOKEN, manifest(2), share(states(0), 0, 1))
    assert order == ["first"]
    writer.check()


def test_a_full_disk_fails_at_once_and_spares_what_was_there(tmp_path: Path) -> None:
    folder = Folder.of(tmp_path, "place", retry_s=60)
    earlier = write(folder, 1)
    path = checkpoint.at(folder, 2)
    path.create()
    # The device that has no space, where the writer is about to put its shard.
    Path(path.path, checkpoint.shard_file(0, 1, TOKEN) + ".partial").symlink_to("/dev/full")
    writer = Writer(0, 1, 30)
    started = time.monotonic()
    writer.save(path, TOKEN, manifest(2), share(states(0), 0, 1))
    with pytest.raises(CheckpointError, match=r"checkpoint .*step-00000002 cannot be written: No space left on device"):
        writer.wait()
    assert time.monotonic() - started < 30
    assert checkpoint.newest(folder) == earlier
    assert equal(restored(earlier), states(0))


def test_a_shard_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    """It fails in the middle of the shard."""
    folder = Folder.of(tmp_path, "place")
    earlier = write(folder, 1)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        said = pool.submit(write_with_room_for, 200, tmp_path).result()
    assert said == f"checkpoint {checkpoint.at(folder, 2)} cannot be written: File too large"
    assert checkpoint.at(folder, 2).names() == []
    assert checkpoint.newest(folder) == earlier
    assert equal(restored(earlier), states(0))


def test_a_disk_that_is_away_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    """Its paths are not found then, and must not be made anew on the disk below its mount point."""
    mounted, unplugged = tmp_path / "storage", tmp_path / "unplugged"
    folder, writer = Folder.of(mounted, "place", retry_s=30), Writer(0, 1, 30)
    folder.create()
    write(folder, 1)
    mounted.rename(unplugged)
    writer.save(checkpoint.at(folder, 2), TOKEN, manifest(2), share(states(1), 0, 1))
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(action) for action in (folder.expect, lambda: retention._complete(folder, folder / "no"))]
        time.sleep(0.5)
        writer.check()
        assert not mounted.exists()
        assert not any(wait.done() for wait in waits)
        unplugged.rename(mounted)
        assert [wait.result(timeout=30) for wait in waits] == [None, False]
    writer.wait()
    assert [restored(checkpoint.at(folder, step)).keys() for step in (1, 2)] == [SHAPES.keys()] * 2


def test_storage_that_stays_away_is_told(tmp_path: Path) -> None:
    (tmp_path / "storage").write_text("no folder")
    folder, writer = Folder.of(tmp_path / "storage", "place", retry_s=0.2), Writer(0, 1, 30)
    writer.save(checkpoint.at(folder, 1), TOKEN, manifest(1), share(states(0), 0, 1))
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        writer.wait()


def test_storage_that_goes_away_before_old_checkpoints_are_deleted_is_told(tmp_path: Path) -> None:
    (tmp_path / "storage").write_text("no folder")
    folder = Folder.of(tmp_path / "storage", "place", retry_s=0.2)
    with pytest.raises(CheckpointError, match="cannot be looked through: Not a directory"):
        prune(folder, 1, CheckpointsConfig())


def test_an_s3_server_that_restarts_is_waited_for(s3: Server) -> None:
    folder = Folder.of(s3.uri, "place", retry_s=60) / "restarts"
    s3.stop()
    writer = Writer(0, 1, 30)
    writer.save(checkpoint.at(folder, 1), TOKEN, manifest(1), share(states(0), 0, 1))
    time.sleep(1)
    writer.check()
    s3.start()
    writer.wait()
    assert equal(restored(checkpoint.at(folder, 1)), states(0))


def _engine_state_after_a_step(raw: dict[str, Any], text: bytes) -> float:
    """How much a state that was taken before a step differs after it."""
    from models.registry import LanguageTask
    from orchestrator.data.batches import Batch
    from orchestrator.engine import Engine

    engine = Engine(parse_config(raw), LanguageTask(256), [16, 16], Group(0, 1, CPU))
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().reshape(4, -1)
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    engine.step(batch, 1)
    state = engine.state()
    before = {name: [part.clone() for part in own.tensors()] for name, own in state.own.items()}
    engine.step(batch, 2)
    changed = engine.state()
    pairs = [zip(parts, state.own[name].tensors(), strict=True) for name, parts in before.items()]
    assert not all(torch.equal(before[name][0], changed.own[name].value) for name in before), "the step did nothing"
    engine.close()
    return max(float((a - b).abs().max()) for pair in pairs for a, b in pair)


@pytest.mark.parametrize("stage", get_args(ClusterConfig.model_fields["zero_stage"].annotation))
def test_what_the_writer_gets_is_a_copy(alone: ProcessPoolExecutor, small_run: dict[str, Any], stage: int) -> None:
    small_run |= {"cluster": {"zero_stage": stage}, "truncation": None}
    assert alone.submit(_engine_state_after_a_step, small_run, os.urandom(4 * 33)).result() == 0


# --- integrity ---


def test_damaged_missing_and_swapped_files_are_refused_by_name(folder: Folder) -> None:
    path = write(folder, 5, workers=2)
    stranger = write(folder, 6, workers=2, seed=1)
    (shard, other), (foreign, _) = checkpoint.verify(path).shards, checkpoint.verify(stranger).shards
    content, theirs = path.read(shard.file), stranger.read(foreign.file)
    assert content is not None
    assert theirs is not None
    for wrong in (theirs, content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        path.write(shard.file, wrong)
        with pytest.raises(UserError, match=f"checkpoint shard .*{shard.file} is damaged; bring its files back"):
            checkpoint.verify(path)
    write(folder, 3)
    with pytest.raises(UserError, match=r"is damaged; delete .*step-00000005 to continue from the one .* step 3$"):
        checkpoint.verify(path)
    path.write(shard.file, content)
    path.delete(other.file)
    with pytest.raises(UserError, match=f"checkpoint shard .*{other.file} is missing"):
        checkpoint.verify(path)


def test_manifests_that_were_changed_or_point_elsewhere_are_refused(folder: Folder) -> None:
    path = write(folder, 5)
    content = path.read(MANIFEST)
    assert content is not None
    forged = json.dumps(json.loads(content) | {"step": 6})
    for text in (forged, content[:-9].decode(), ""):
        path.write(MANIFEST, text.encode())
        with pytest.raises(UserError, match=r"checkpoint manifest .*manifest\.json is damaged"):
            checkpoint.verify(path)
    path.delete(MANIFEST)
    with pytest.raises(UserError, match=r"checkpoint manifest .*manifest\.json is missing"):
        checkpoint.verify(path)


def sealed(content: dict[str, Any]) -> bytes:
    """A manifest with the digest that belongs to it, as anyone can compute it."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return json.dumps(rest | {"digest": digest}).encode()


def test_manifests_with_a_digest_of_their_own_are_refused_for_what_they_say(folder: Folder) -> None:
    path = write(folder, 5)
    content = path.read(MANIFEST)
    assert content is not None
    whole = json.loads(content)
    path.write(MANIFEST, sealed(whole))
    assert equal(restored(path), states(0)), "sealed as the writer does"
    (shard,) = whole["shards"]
    unnamed = "is damaged: it names no shard for some of its parameters"
    for change, words in [
        ({"shards": [shard | {"file": f"../step-00000005/{shard['file']}"}]}, "is damaged, or of another version"),
        ({"shards": [shard | {"file": "/etc/passwd"}]}, "is damaged, or of another version"),
        ({"shard_of": whole["shard_of"] | {"norm": 1}}, unnamed),
        ({"shard_of": whole["shard_of"] | {"norm": -1}}, unnamed),
        ({"shard_of": {}}, unnamed),
        ({"step": 6}, "is of step 6"),
    ]:
        path.write(MANIFEST, sealed(whole | change))
        with pytest.raises(UserError, match=rf"checkpoint manifest .*manifest\.json {words}"):
            checkpoint.verify(path)


@pytest.mark.parametrize("what", ["checkpoint shard", "checkpoint manifest", "checkpoint"])
def test_what_leads_out_of_its_folder_is_refused(tmp_path: Path, what: str) -> None:
    """Though what it leads to is what was written."""
    path = write(Folder.of(tmp_path, "place"), 5)
    (shard,) = checkpoint.verify(path).shards
    place = {"checkpoint shard": f"{path}/{shard.file}", "checkpoint manifest": f"{path}/{MANIFEST}"}
    file = Path(place.get(what, str(path)))
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{what} {file} is a link"):
        checkpoint.verify(path)


def test_a_checkpoint_in_the_place_of_another_is_refused(small_run: dict[str, Any]) -> None:
    """Whole and undamaged: another run's by its config or its data, and the run's own by its step."""
    config = parse_config(small_run)
    place = checkpoints_of(config.storage / config.name, None)
    mine = config.model_dump(mode="json")
    place.create()
    for content, words in [
        ({"config": mine | {"seed": 5}}, r"another value of seed \(was 5, is 0\)"),
        ({"config": mine, "data_sha256": "0" * 64}, "is not what it was trained on"),
    ]:
        path = write(place, 5, **content)
        with pytest.raises(UserError, match=words):
            launch.train(config)
    shutil.copytree(path.path, checkpoint.at(place, 9).path)
    with pytest.raises(UserError, match=r"step-00000009/manifest\.json is of step 5, not of its folder's"):
        launch.train(config)


# --- which stay ---


def test_retention_keeps_the_last_the_best_and_the_cuts() -> None:
    measured = [3.0, 1.0, 1.0, math.nan, None, 2.0, 5.0]
    manifests = [manifest(step, val_loss=loss, after_cut=step == 4) for step, loss in enumerate(measured)]

    def stay(**policy: Any) -> set[int]:
        random.Random(0).shuffle(manifests)
        return kept(manifests, CheckpointsConfig(**policy))

    assert stay() == {5, 6, 1, 4}
    assert stay(keep_best=3, keep_cuts=False) == {5, 6, 1, 2}
    assert stay(keep_last=1, keep_best=0, keep_cuts=False) == {6}
    assert stay(keep_last=9) == set(range(7))


def test_pruning_leaves_complete_checkpoints_alone_that_are_to_stay(folder: Folder) -> None:
    losses = {1: 0.5, 2: 3.0, 3: 2.0, 4: 1.0, 5: 4.0}
    for step, loss in losses.items():
        watch = Watch(step=4, before=1.0, evaluations_left=1) if step == 5 else None
        write(folder, step, val_loss=loss, after_cut=step == 3, seed=step, watch=watch)
    write(folder, 9)  # has been taken back
    write(folder, 12).delete(MANIFEST)
    for step in (2, 4):
        checkpoint.uncut_at(folder, step).create()
    checkpoint.at(folder, 2).delete(MANIFEST)  # as if a deletion had been interrupted
    prune(folder, 5, CheckpointsConfig(keep_last=1))
    assert checkpoint.steps(folder) == [1, 3, 5]
    assert all(equal(restored(checkpoint.at(folder, step)), states(step)) for step in (1, 3, 5))
    assert [path.name for path in checkpoint.uncuts(folder)] == ["uncut-00000004"], "what step 5 is still watching"


def test_a_damaged_checkpoint_is_not_deleted_for_its_loss(folder: Folder) -> None:
    for step in (1, 2, 3):
        write(folder, step)
    checkpoint.at(folder, 1).write(MANIFEST, b"{}")
    prune(folder, 3, CheckpointsConfig(keep_last=1, keep_best=0))
    assert checkpoint.steps(folder) == [1, 3]


# --- where ---


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/checkpoints?scheme=http&region=eu-central-1&endpoint_override=127.0.0.1:9000",
        "s3://bucket?region=eu-central-1",
        "file:///tmp/checkpoints",
        "/tmp/what? a folder#1",
    ],
)
def test_what_lies_inside_a_place_is_on_the_same_server(uri: str) -> None:
    outer, inner = (Folder.of(place, "storage") for place in (uri, inside(uri, Path("sweep", "trial-00000"))))
    assert inner.filesystem == outer.filesystem
    assert inner.path == f"{outer.path}/sweep/trial-00000"


def test_google_storage_is_understood() -> None:
    """As far as that goes without a network."""
    folder = Folder.of("gs://anonymous@bucket/checkpoints/", "checkpoints.storage") / "small"
    assert (folder.path, folder.is_local, folder.name) == ("bucket/checkpoints/small", False, "small")


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("nowhere://bucket", r"checkpoints\.storage nowhere://bucket cannot be opened .* must be a folder or a URI"),
        ("s3://bucket?color=red", r"checkpoints\.storage s3://bucket\?color=red cannot be opened .*color"),
        ("/dev/null/checkpoints", r"checkpoints\.storage: /dev/null/checkpoints/small cannot be written \(Not a dir"),
    ],
)
def test_storage_that_cannot_be_used_is_refused_in_one_sentence(
    small_run: dict[str, Any], storage: str, words: str
) -> None:
    with (
        pytest.raises(UserError, match=words) as refused,
        run_folder(parse_config(small_run | {"checkpoints": {"storage": storage}})),
    ):
        pytest.fail("the run began")
    assert "\n" not in str(refused.value)
    assert list(Path(small_run["storage"]).iterdir()) == []


@pytest.mark.cluster
def test_a_run_on_s3_continues_though_its_machine_is_gone_and_is_loaded_from_there(
    s3: Server, small_run: dict[str, Any], local_ray: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """The model is loaded without Ray, DeepSpeed or MLflow."""
    small_run["checkpoints"] = {"storage": f"{s3.uri}", "keep_last": 1, "keep_best": 0}
    run = Path(small_run["storage"]) / "small"
    train(parse_config(small_run))
    folder = Folder.of(s3.uri, "place") / "small"
    assert checkpoint.steps(folder) == [3, 7, 12], "both cuts and the last"
    last = checkpoint.at(folder, 12)
    ended = checkpoint.load_values(last, checkpoint.verify(last))

    checkpoint.delete(last)
    shutil.rmtree(run)
    train(parse_config(small_run))
    output = capfd.readouterr().out
    assert "continued after step 7" in output
    assert f"checkpoint  {last}" in output
    again = checkpoint.load_values(last, checkpoint.verify(last))
    assert all(torch.equal(again[name], value) for name, value in ended.items())

    uri = s3.uri.replace("checkpoints?", "checkpoints/small?")
    assert dims_loaded_alone(str(run), uri) == "[4, 4] [4, 4]\n"


@pytest.mark.cluster
@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=pytest.mark.long)])
def test_storage_that_goes_away_in_the_middle_of_a_run_is_waited_for(
    seconds: int, small_run: dict[str, Any], local_ray: None, tmp_path: Path
) -> None:
    """The run stands still meanwhile, loses no worker, and ends with all its checkpoints."""
    there, away, place = tmp_path / "disk", tmp_path / "away", tmp_path / "storage" / "small"
    small_run["checkpoints"] |= {"storage": str(place.parent)}
    there.mkdir()
    place.parent.mkdir()
    place.symlink_to(there)
    last = there / "step-00000012" / MANIFEST

    def disappear() -> bool:
        wait_until((there / "step-00000003" / MANIFEST).exists, "the first checkpoint")
        away.symlink_to("/dev/null/nothing")
        away.replace(place)
        time.sleep(seconds)
        missed = not last.exists()
        away.symlink_to(there)
        away.replace(place)
        return missed

    with ThreadPoolExecutor(1) as pool:
        missed = pool.submit(disappear)
        summary = train(parse_config(small_run))
        assert missed.result(), "storage was there again before it was needed"
    folder = Folder.of(place, "place")
    assert [checkpoint.verify(checkpoint.at(folder, step)).step for step in (3, 5, 7, 10, 12)] == [3, 5, 7, 10, 12]
    assert summary["final_dims"] == [4, 4]
    assert (Path(small_run["storage"]) / "small" / "attempt").read_text() == "1\n"


@pytest.mark.long  # workers that fail are started again for the next test
@pytest.mark.cluster
def test_a_checkpoint_that_cannot_be_written_ends_the_training_in_one_sentence(
    small_run: dict[str, Any], local_ray: None
) -> None:
    """The last one, whose write no step comes after."""
    small_run["train"] |= {"steps": 6, "checkpoint_every": 100}
    config = parse_config(small_run | {"truncation": None, "checkpoints": {"retry_s": 0}})
    checkpoints = config.storage / config.name / "checkpoints"

    def obstruct() -> None:
        while not checkpoints.exists():
            time.sleep(0.01)
        (checkpoints / "step-00000006").write_text("no folder")

    thread = threading.Thread(target=obstruct)
    thread.start()
    with pytest.raises(
        TrainingError, match=r"CheckpointError: .*step-00000006 cannot be written: File exists"
    ) as failed:
        train(config)
    thread.join()
    assert "\n" not in str(failed.value)


def test_a_bucket_that_does_not_exist_is_refused(s3: Server, small_run: dict[str, Any]) -> None:
    small_run["checkpoints"] = {"storage": s3.uri.replace("bucket", "pail")}
    words = r"checkpoints\.storage: s3://pail/checkpoints/small cannot be written"
    with pytest.raises(UserError, match=words), run_folder(parse_config(small_run)):
        pytest.fail("the run began")
