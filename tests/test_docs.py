"""The documentation tells the truth: its programs run, its pictures are up to date."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

import jax_na

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ("README.md", "docs/window.md", "docs/frames.md", "docs/sharding-and-export.md")


def _run(*command: str | pathlib.Path) -> None:
    """Runs Python with the jax_na under test and eight fake devices, CPUs all of them."""
    environment = os.environ | {
        "PYTHONPATH": str(pathlib.Path(jax_na.__file__).parents[1]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    result = subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES)
def test_programs_of(page: str, tmp_path: pathlib.Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert blocks
    program = tmp_path / "program.py"
    program.write_text("\n".join(blocks), encoding="utf-8")
    _run(program)


def test_pictures_are_up_to_date() -> None:
    _run(ROOT / "docs" / "figures.py", "--check")
