"""The cluster secret: from the environment, else one file for each user, made once and whole."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from scheduler.errors import SetupError
from serving.secret import VARIABLE, cluster_secret


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """This user's configuration, empty."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def test_the_environment_comes_first(monkeypatch, home):
    monkeypatch.setenv(VARIABLE, "from outside")
    assert cluster_secret(create=True) == cluster_secret(create=False) == "from outside"
    assert list(home.iterdir()) == []


def test_it_is_made_once_and_only_its_user_can_read_it(home):
    secret = cluster_secret(create=True)
    assert len(secret) == 64
    assert cluster_secret(create=True) == cluster_secret(create=False) == secret
    (path,) = (home / "motley").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_without_a_configuration_folder_it_is_in_the_home(monkeypatch, home):
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(home))
    cluster_secret(create=True)
    assert (home / ".config" / "motley" / "secret").exists()


def test_many_at_once_agree():
    with ThreadPoolExecutor(8) as threads:
        made = set(threads.map(lambda _: cluster_secret(create=True), range(32)))
    assert len(made) == 1


def test_a_worker_without_one_is_told_what_to_do():
    with pytest.raises(SetupError, match="run `motley secret` on the router's machine"):
        cluster_secret(create=False)


def test_an_empty_file_is_no_secret(home):
    (home / "motley").mkdir()
    (home / "motley" / "secret").write_text("\n")
    for create in (True, False):
        with pytest.raises(SetupError, match="is empty"):
            cluster_secret(create=create)


def test_a_folder_that_cannot_be_made_is_named(home):
    (home / "motley").write_text("a file")
    with pytest.raises(SetupError, match=f"cannot use {home}/motley/secret.*or set {VARIABLE}"):
        cluster_secret(create=True)
