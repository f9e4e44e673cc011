"""What users get: the source distribution, the wheel built from it, and what the import brings along."""

import email
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support import run_python

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_distributions(tmp_path):
    build = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", tmp_path, ROOT],  # the wheel from the source distribution
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert build.returncode == 0, build.stdout
    (source,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")

    with tarfile.open(source) as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert files_of_the_project() - packed == set()

    with zipfile.ZipFile(wheel) as archive:
        installed = set(archive.namelist())
        metadata = email.message_from_bytes(archive.read("posix_ipc-2.0.0.dist-info/METADATA"))
        entry_points = archive.read("posix_ipc-2.0.0.dist-info/entry_points.txt").decode()
    package = {name.removeprefix("posix_ipc/") for name in installed if not name.startswith("posix_ipc-")}
    extension = {name for name in package if name.startswith("_ext.") and name.endswith(".so")}
    modules = {path.name for path in (ROOT / "posix_ipc").glob("*.py")}
    assert len(extension) == 1
    assert package == modules | extension | {"_ext.pyi", "py.typed"}
    assert "posix_ipc-2.0.0.dist-info/licenses/LICENSE" in installed
    assert [line for line in entry_points.splitlines() if line] == [
        "[console_scripts]",
        "posix-ipc = posix_ipc.__main__:main",
        "[pytest11]",
        "posix_ipc = posix_ipc.pytest_plugin",
    ]

    assert metadata["Name"] == "posix_ipc"
    assert metadata["Version"] == "2.0.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "BSD-3-Clause"
    requirements = metadata.get_all("Requires-Dist")
    assert [line for line in requirements if "extra ==" not in line] == ["psutil>=5.9"]
    assert set(metadata.get_all("Provides-Extra")) == {"cli", "dev", "test"}


def files_of_the_project():
    """Return the paths that the source distribution must hold: all but what git and CI need, and what was built."""
    folders = ("benchmarks", "docs", "examples", "posix_ipc", "stress", "tests", "tools")
    paths = [path for path in ROOT.glob("*") if path.is_file() and not path.name.startswith(".")]
    paths += [path for folder in folders for path in ROOT.glob(f"{folder}/**/*") if path.is_file()]
    return {str(path.relative_to(ROOT)) for path in paths if path.suffix != ".so" and "__pycache__" not in path.parts}


def test_import_is_light():
    """The core alone needs neither of them, and each would cost more time than all of it."""
    run_python("import sys, posix_ipc; assert not {'multiprocessing', 'psutil'} & set(sys.modules)")
