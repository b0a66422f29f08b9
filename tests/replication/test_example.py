"""The example, run as a user runs it: two processes, on the usual port."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "replicated_shop.py"

pytestmark = pytest.mark.usefixtures("fixed_ports")


def test_the_shop_is_replicated(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, EXAMPLE, "primary", "60"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as shop:
        try:
            finished = subprocess.run(
                [sys.executable, EXAMPLE, "replica", "copy", "3"],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=50,
                check=False,
            )
        finally:
            shop.terminate()
        assert shop.stdout is not None
        told = shop.stdout.read()
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1].startswith("3 orders at (1, ")
    assert "copy streaming at " in told
