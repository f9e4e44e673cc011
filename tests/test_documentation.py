"""What the documentation shows is run as it is written there: the examples in Python, and what draws the pictures."""

import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from support import PACKAGE_PARENT, TESTS, private_host

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tracking and leak checks are for Linux")

ROOT = TESTS.parent
if not (ROOT / "README.md").exists():
    pytest.skip("only in a checkout", allow_module_level=True)


def blocks(page, language="python"):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [text for marked, text in found if marked == language]


def block(page, head):
    """The one that begins like that."""
    (found,) = [text for text in blocks(page) if text.startswith(head)]
    return found


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a program, where it sees no objects but its own."""
    prefix = private_host()
    if prefix is None:
        pytest.skip("no right to unshare")

    def run(code):
        (tmp_path / "demo.py").write_text(code)
        return subprocess.run(
            [*prefix, sys.executable, "demo.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_each_example_is_run():
    """By the tests below; who adds one to a page adds its test."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = {str(page.relative_to(ROOT)): len(blocks(page)) for page in pages}
    assert {page: count for page, count in found.items() if count} == {
        "README.md": 1,
        "docs/leaks.md": 1,
        "docs/leak-check.md": 2,
    }


@pytest.mark.slow
def test_example_of_the_readme(run):
    example = block("README.md", "import multiprocessing")
    (said,) = re.findall(r"# (\d+); afterwards nothing is left", example)
    ended = run(example + "\n    import os; print([name for name in os.listdir('/dev/shm') if name[0] != '.'])\n")
    assert (ended.stdout, ended.stderr, ended.returncode) == (f"{said}\n[]\n", "", 0)


@pytest.mark.slow
def test_example_of_leaks(run):
    before = "import posix_ipc; semaphore = posix_ipc.Semaphore('/example', posix_ipc.O_CREX)\n"
    ended = run(before + block("docs/leaks.md", "from posix_ipc.mp_integration"))
    assert (ended.stderr, ended.returncode) == ("", 0)
    assert re.match(r"live semaphore /example \S.*\n\Z", ended.stdout)


@pytest.mark.slow
def test_example_of_leak_check(run, tmp_path):
    """And the error is the one that stands below it."""
    ended = run(block("docs/leak-check.md", "import posix_ipc"))
    (told,) = [text for text in blocks("docs/leak-check.md", "") if text.startswith("posix_ipc.leaks.LeakError")]
    said = ended.stderr.replace(f"{tmp_path}/", "").replace(sys.executable, "python")
    for pattern in (r"'/\w+'", r"pid \d+"):
        assert len(re.findall(pattern, told)) == 1
        told = told.replace(*re.findall(pattern, told), *re.findall(pattern, said))
    assert ended.returncode == 1
    assert said.endswith(f"\n{told}")


@pytest.mark.slow
def test_example_of_the_pytest_plugin(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE_PARENT))
    pytester.makepyfile("import pytest\n" + block("docs/leak-check.md", "@pytest.mark.ipc_leaks"))
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--strict-markers", "--ipc-leaks=error")
    result.assert_outcomes(passed=1)


def test_the_page_tells_which_commands_take_which_options():
    from posix_ipc import __main__

    (commands,) = (action.choices for action in __main__.parser()._actions if action.dest == "command")

    def takers(option):
        return {name for name, each in commands.items() if option in each._option_string_actions}

    page = " ".join((ROOT / "docs" / "command-line.md").read_text().split())
    without_json, with_kind, with_prefix = re.search(
        r"All but (.*?) take `--json`\. `--kind .*? for (.*?); `--prefix TEXT` for (.*?)\. Names", page
    ).groups()
    assert set(re.findall(r"`(\w+)`", without_json)) == commands.keys() - {"names"} - takers("--json")
    assert set(re.findall(r"`(\w+)`", with_kind)) == takers("--kind")
    assert set(re.findall(r"`(\w+)`", with_prefix)) == takers("--prefix")


@pytest.mark.slow
def test_pictures_can_be_drawn(tmp_path):
    """`make pictures` draws those that the page shows."""
    pytest.importorskip("rich")
    if private_host() is None:
        pytest.skip("no right to unshare")
    shown = re.findall(r"\]\(pictures/(\S+)\)", (ROOT / "docs" / "command-line.md").read_text())
    subprocess.run(
        [sys.executable, ROOT / "docs" / "make_pictures.py", "--to", tmp_path, "--age", "0"], check=True, timeout=60
    )
    assert sorted(shown) == sorted(os.listdir(tmp_path))
    for name in shown:
        text = "".join(ElementTree.parse(tmp_path / name).getroot().itertext()).replace("\N{NO-BREAK SPACE}", " ")
        assert f"$ posix-ipc {name.removesuffix('.svg')}" in text
        assert "Traceback" not in text
