"""Which shards stay on a disk: what a formation needs, or the one before it, of any process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from scheduler.errors import SetupError
from workers.group import shard_folder
from workers.group.shard_folder import CLAIM, ShardFolder


@pytest.fixture
def process(tmp_path):
    """Makes the view of another process, of this model."""
    made = []

    def make(model="m"):
        made.append(ShardFolder(tmp_path, model))
        return made[-1]

    yield make
    for folder in made:
        folder.close()


def form(folder, *sources):
    """A formation that needs these stands."""
    for source in sources:
        (folder.claim(source) / "weights.bin").write_text(source)
    folder.stands()


def kept(folder):
    return sorted(file.read_text() for file in folder.path.glob("*/weights.bin"))


def test_the_shards_of_this_formation_and_the_last_one_stay(process):
    rank = process()
    form(rank, "1 of 4", "2 of 4")
    form(rank, "1 of 3")
    assert kept(rank) == ["1 of 3", "1 of 4", "2 of 4"]
    form(rank, "1 of 4", "2 of 4")
    assert kept(rank) == ["1 of 3", "1 of 4", "2 of 4"]
    form(rank, "1 of 2")
    assert kept(rank) == ["1 of 2", "1 of 4", "2 of 4"]


def test_what_a_formation_that_broke_had_claimed_goes_two_formations_later(process):
    rank = process()
    rank.claim("1 of 5")
    form(rank, "1 of 4")
    form(rank, "1 of 3")
    form(rank, "1 of 2")
    assert kept(rank) == ["1 of 2", "1 of 3"]
    assert len(list(rank.path.iterdir())) == 2


def test_what_another_process_needs_stays_until_it_ends(process):
    one, other = process(), process()
    form(other, "2 of 2")
    form(one, "1 of 2")
    assert kept(one) == ["1 of 2", "2 of 2"]
    other.close()
    form(one, "1 of 2")
    assert kept(one) == ["1 of 2"]


def test_a_killed_process_needs_nothing(process, tmp_path):
    program = """
import sys
from pathlib import Path
from workers.group.shard_folder import ShardFolder
folder = ShardFolder(Path(sys.argv[1]), "m")
(folder.claim("2 of 2") / "weights.bin").write_text("2 of 2")
print("claimed", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as rank:
        rank.stdout.readline()
        form(process(), "1 of 2")
        assert kept(process()) == ["1 of 2", "2 of 2"]
        rank.kill()
    form(process(), "1 of 2")
    assert kept(process()) == ["1 of 2"]


def test_other_models_are_not_ours_to_judge(process):
    other = process("another")
    form(other, "another")
    other.close()
    form(process(), "1 of 2")
    assert kept(process()) == ["1 of 2", "another"]


def test_ranks_that_compute_from_the_model_s_own_file_delete_nothing(process):
    before = process()
    form(before, "1 of 2")
    before.close()
    process().stands()
    assert kept(process()) == ["1 of 2"]


def test_a_deletion_that_was_cut_off_is_completed(process):
    rank = process()
    left = rank.path / "0123.deleted"
    left.mkdir()
    (left / "weights.bin").write_text("much")
    form(rank, "1 of 2")
    assert not left.exists()


def test_a_folder_that_takes_nothing_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="another folder with --shards"):
        ShardFolder(tmp_path / "file", "m").claim("1 of 2")


def test_only_one_writes_a_shard_at_a_time(tmp_path):
    """Two groups of one machine that cut the model alike want the same files."""
    written, places = [], [ShardFolder(tmp_path, "m") for _ in range(4)]

    def want(rank):
        place = rank.claim("1 of 2")
        with rank.writing(place):
            if not (place / "weights.bin").exists():
                written.append(rank)
                (place / "draft").write_text("weights")
                os.sched_yield()
                (place / "draft").rename(place / "weights.bin")

    with ThreadPoolExecutor(len(places)) as pool:
        list(pool.map(want, places))
    assert len(written) == 1
    for rank in places:
        rank.close()


def test_a_writer_that_never_ends_is_not_waited_for_for_ever(process, monkeypatch):
    monkeypatch.setattr(shard_folder, "WRITE_S", 0.0)
    one, other = process(), process()
    busy = pytest.raises(SetupError, match="another process has been writing")
    with one.writing(one.claim("1 of 2")), busy, other.writing(other.claim("1 of 2")):
        pass


def test_a_shard_that_was_claimed_is_never_deleted_however_they_meet(tmp_path):
    """One process forms again and again, and needs nothing of what the other takes and gives up."""
    stop = threading.Event()

    def sweep():
        with closing(ShardFolder(tmp_path, "m")) as folder:
            while not stop.is_set():
                folder.claim("mine")
                folder.stands()

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    deleted = 0
    try:
        for _ in range(300):
            with closing(ShardFolder(tmp_path, "m")) as folder:
                place = folder.claim("theirs")
                weights = place / "weights.bin"
                deleted += not weights.exists()
                weights.write_text("theirs")
                os.sched_yield()
                assert weights.read_text() == "theirs"
                assert (place / CLAIM).read_text() == "m"
    finally:
        stop.set()
        sweeper.join()
    assert deleted > 1
