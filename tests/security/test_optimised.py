"""A11: `python -O`, which removes every `assert`, changes nothing: the library has none.

Its code is the same with and without, and the attacks in this folder run once more under -O. pytest writes the asserts
of tests anew, so those still hold; that is checked first.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
OPTIONS = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestConfigWarning"]


def run_optimised(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-O", "-m", "pytest", *OPTIONS, *words]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)


def test_the_code_is_the_same() -> None:
    assert len(SOURCES) > 50
    for path in SOURCES:
        text = path.read_text()
        plain, optimised = (compile(text, str(path), "exec", optimize=level) for level in (0, 1))
        assert plain == optimised, f"{path} has an assert, or asks for __debug__"
    planted = [compile("assert x", "planted", "exec", optimize=level) for level in (0, 1)]
    assert planted[0] != planted[1]


def test_a_test_under_optimisation_can_fail(tmp_path: Path) -> None:
    (tmp_path / "test_planted.py").write_text("def test_planted():\n    assert not __debug__\n    assert 1 == 2\n")
    result = run_optimised(str(tmp_path))
    assert result.returncode == 1, result.stdout
    assert "assert 1 == 2" in result.stdout


@pytest.mark.timeout(200)
@pytest.mark.skipif(not __debug__, reason="this is the optimised run")
def test_all_attacks_under_optimisation() -> None:
    # What starts programs of its own does so without -O, and traffic is no attack.
    others = ["test_optimised.py", "test_command_line.py", "test_traffic.py"]
    ignored = [f"--ignore={HERE / name}" for name in others]
    result = run_optimised("-x", *ignored, str(HERE), "-k", "not canary_is_found and not asyncio")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout.splitlines()[-1]
