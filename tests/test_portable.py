"""What is said where tracking is not there; `make test-portable` has such a build."""

import subprocess
import sys

import pytest

from posix_ipc import _ext

pytestmark = pytest.mark.skipif(hasattr(_ext, "Journal"), reason="tracking is there: make test-portable")


@pytest.mark.parametrize("module", ["mp_integration", "leaks"])
def test_modules_that_need_linux_say_so(module):
    code = f"import posix_ipc.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: posix_ipc: tracked objects and leak detection need Linux"
    )


@pytest.mark.parametrize("arguments", [["ls"], ["doctor"], ["reap", "--yes"]], ids=" ".join)
def test_commands_say_so_in_a_line(arguments):
    done = subprocess.run([sys.executable, "-m", "posix_ipc", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "posix-ipc: this command needs Linux\n")
