"""The flat package names are ours alone, and importing them does nothing."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = SETTINGS["tool"]["setuptools"]["packages"]
TOP_LEVEL = sorted({name.partition(".")[0] for name in PACKAGES} | {"motley"})


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_no_other_distribution_owns_our_name(name):
    assert set(packages_distributions().get(name, ["motley"])) == {"motley"}


def test_every_package_is_listed():
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in TOP_LEVEL
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert found == set(PACKAGES)


def test_the_router_starts_without_torch():
    code = (
        "import sys, serving.run, workers.build, workers.service, motley\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'gguf'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
