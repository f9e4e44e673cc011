"""A lint over the C source, for rules that no compiler knows: locks, and state that is nobody's module.

It reads functions as the source lays them out: a body stands between a "{" and a "}" in the first column. What a call
may do is followed through all functions of these files. That it sees a fault is tested on small faulty sources.
"""

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "posix_ipc"
SOURCES = [PACKAGE / "_ext.c", *sorted((PACKAGE / "_native").glob("*.[ch]"))]

needs_sources = pytest.mark.skipif(not SOURCES[0].exists(), reason="an installed package has no C source")

# Without the interpreter lock a program may do nothing with Python but these: they read a field, or use no interpreter.
WITHOUT_LOCK = {"PyBytes_AS_STRING", "PyBytes_GET_SIZE", "PyMem_RawMalloc", "PyMem_RawCalloc", "PyMem_RawFree"}
# In a critical section it may also raise reference counts, and make objects that no collection of garbage looks at.
IN_SECTION = WITHOUT_LOCK | {"Py_INCREF", "Py_XINCREF", "Py_NewRef", "Py_XNewRef", "PyBytes_FromStringAndSize"}

PYTHON_CALL = re.compile(r"\b((?:_?Py[A-Z]?\w*_\w+)|raise_\w+)\s*\(")
CALL = re.compile(r"\b([A-Za-z_]\w*)\s*\(")
JUMP = re.compile(r"\b(return|goto|break|continue)\b")

BEGIN_ALLOW, END_ALLOW = "Py_BEGIN_ALLOW_THREADS", "Py_END_ALLOW_THREADS"
BEGIN_SECTION, END_SECTION = "Py_BEGIN_CRITICAL_SECTION", "Py_END_CRITICAL_SECTION"


# ---- reading C ----


def blank(text):
    """Return the source without comments, strings, characters and preprocessor lines; line numbers stay."""
    token = re.compile(
        r"""/\*.*?\*/ | //[^\n]* | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*' | ^[ \t]*\#(?:\\\n|[^\n])*""",
        re.DOTALL | re.MULTILINE | re.VERBOSE,
    )

    def replace(match):
        found = match[0]
        kept = '""' if found[0] == '"' else "0" if found[0] == "'" else " "
        return kept + "\n" * found.count("\n")

    return token.sub(replace, text)


class Function(NamedTuple):
    name: str
    body: str


def functions(text):
    """Return the functions of a source without comments."""
    found = []
    for match in re.finditer(r"^(\w+)\([^;{}]*\)\n\{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE):
        found.append(Function(match[1], match[2]))
    return found


def blocks(function, begin, end, faults):
    """Return the texts between begin and end; report what is not paired."""
    parts = re.split(rf"\b({begin}|{end})\b(?:\([^()]*\))?;?", function.body)
    found, depth = [], 0
    for marker, text in zip(parts[1::2], parts[2::2], strict=True):
        depth += 1 if marker == begin else -1
        if depth not in (0, 1):
            faults.append(f"{function.name}: {begin} and {end} are not paired")
            return []
        if depth == 1:
            found.append(text)
    if depth != 0:
        faults.append(f"{function.name}: {begin} without {end}")
    return found


def jumps_out(text):
    """Does control leave the block? A break or continue that belongs to a loop or a switch within it does not."""
    leaving = []
    for match in JUMP.finditer(text):
        inside = any(
            loop.end() <= match.start() < end_of_statement(text, loop.end())
            for loop in re.finditer(r"\b(?:for|while|switch|do)\b", text)
        )
        if match[1] in ("return", "goto") or not inside:
            leaving.append(match[1])
    return leaving


def end_of_statement(text, start):
    """Return where the statement that a loop's keyword begins is over: behind its braces, or its semicolon."""
    depth = 0
    for position in range(start, len(text)):
        character = text[position]
        depth += (character in "({") - (character in ")}")
        if depth < 0 or (depth == 0 and character in "};"):
            return position
    return len(text)


# ---- the rules ----


def forbidden_calls(text, bodies, allowed, also, seen=frozenset()):
    """Return the ways by which the text reaches a call that is not allowed."""
    found = [name for name in PYTHON_CALL.findall(text) if name not in allowed]
    found += [word for word in also if re.search(rf"\b{word}\b", text)]
    for name in CALL.findall(text):
        if name in bodies and name not in seen:
            inner = forbidden_calls(bodies[name], bodies, allowed, also, seen | {name})
            found += [f"{name} -> {each}" for each in inner]
    return found


def check_locks(sources):
    """Return the faults of sources without comments, by file name."""
    faults = []
    bodies = {function.name: function.body for text in sources.values() for function in functions(text)}
    for file, text in sources.items():
        own = []
        for begin, end, allowed, also in (
            # Who waits for a critical section without the lock could wait for ever; who has one must not wait.
            (BEGIN_ALLOW, END_ALLOW, WITHOUT_LOCK, [BEGIN_SECTION]),
            (BEGIN_SECTION, END_SECTION, IN_SECTION, [BEGIN_SECTION, BEGIN_ALLOW]),
        ):
            in_functions = 0
            for function in functions(text):
                in_functions += len(re.findall(rf"\b{begin}\b", function.body))
                for block in blocks(function, begin, end, own):
                    own += [f"{function.name}: {jump} in a block of {begin}" for jump in jumps_out(block)]
                    own += [
                        f"{function.name}: {call} in a block of {begin}"
                        for call in forbidden_calls(block, bodies, allowed, also)
                    ]
            if in_functions != len(re.findall(rf"\b{begin}\b", text)):
                own.append(f"{begin} stands where this lint sees no function")
        faults += [f"{file}: {fault}" for fault in own]
    return faults


# What the C API wants without const: it is written once, when the module is loaded, by the interpreter.
API_STRUCTURES = "PyModuleDef|PyModuleDef_Slot|PyMethodDef|PyGetSetDef|PyMemberDef|PyType_Slot|PyType_Spec"


def top_level(text):
    """Return the declarations outside functions, each without what stands in its braces."""
    declarations, current, depth = [], "", 0
    for character in text:
        if character == "{":
            depth += 1
            current += "{" if depth == 1 else ""
        elif character == "}":
            depth -= 1
            current += "}" if depth == 0 else ""
            if depth == 0 and re.search(r"\)\s*\{\}$", current):  # a function
                current = ""
        elif depth == 0:
            if character == ";":
                declarations.append(" ".join(current.split()))
                current = ""
            else:
                current += character
    return declarations


def is_mutable(declaration):
    """Is this the declaration of a variable, not of a type or a function, that could be written to?"""
    if re.match(rf"(static\s+|extern\s+)*(struct\s+)?({API_STRUCTURES})\b", declaration):
        return False
    if re.match(r"(typedef|enum|struct|union)\b[^=]*\{\}$|typedef\b|(struct|enum|union)\s+\w+$", declaration):
        return False
    left = declaration.partition("=")[0]
    if re.match(r"[\w\s*]*\w\(", left):  # a function's prototype; a pointer to one has a "(*" first
        return False
    if "*" in left:
        return not re.search(r"\*\s*const\b[^*]*$", left)
    return not re.search(r"\bconst\b", left)


def check_state(sources):
    faults = []
    for file, text in sources.items():
        faults += [f"{file}: {declaration}" for declaration in top_level(text) if is_mutable(declaration)]
        for function in functions(text):
            for statement in re.findall(r"\bstatic\s+[^;{=]*", function.body):
                if is_mutable(statement):
                    faults.append(f"{file}: {function.name}: {statement.strip()}")
    return faults


# ---- the sources ----


@pytest.fixture(scope="module")
def sources():
    return {path.name: blank(path.read_text(encoding="utf-8")) for path in SOURCES}


@needs_sources
def test_the_lint_reads_the_sources(sources):
    """It is of no use if it finds nothing to look at."""
    found = {name: functions(text) for name, text in sources.items()}
    assert all(found[name] for name in found if name.endswith(".c"))
    text = "".join(sources.values())
    assert sum(len(each) for each in found.values()) == len(re.findall(r"^\{$", text, re.MULTILINE))
    assert text.count(BEGIN_ALLOW) >= 5
    assert text.count(BEGIN_SECTION) >= 20


@needs_sources
def test_locks(sources):
    assert check_locks(sources) == []


@needs_sources
def test_all_state_is_in_the_module_or_constant(sources):
    assert check_state(sources) == []


@needs_sources
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_file_begins_with_a_comment(path):
    assert re.match(r"/\* \w", path.read_text(encoding="utf-8"))


# ---- other systems ----

HEADERS = """
    errno.h fcntl.h limits.h pthread.h semaphore.h signal.h stdatomic.h stdio.h stdlib.h string.h sys/mman.h
    sys/resource.h sys/stat.h sys/statvfs.h unistd.h
"""

# What the headers of this system say is taken back, and what the other one has not must not be called.
GLIBC = "__GLIBC__ __GLIBC_PREREQ"
LINUX = f"{GLIBC} __linux__ STATX_BTIME AT_EMPTY_PATH O_TMPFILE RLIMIT_MSGQUEUE MADV_WIPEONFORK"
SYSTEMS = {
    "Linux with musl": ("", GLIBC, "sem_clockwait"),
    "macOS": (
        "#define __APPLE__ 1\n",
        LINUX,
        "sem_clockwait sem_timedwait sem_getvalue posix_fallocate statx ppoll",
    ),
    "FreeBSD": ("", LINUX, "sem_clockwait statx"),
}


@pytest.mark.slow
@needs_sources
@pytest.mark.skipif(sys.platform != "linux", reason="it pretends on the headers of Linux")
@pytest.mark.parametrize("system", SYSTEMS)
def test_source_can_be_read_by_the_compiler_of(system, tmp_path):
    """Its own headers are not here, but that the guards leave out what it has not can be seen."""
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        pytest.skip("no compiler")
    defined, undefined, missing = SYSTEMS[system]
    lines = [f"#include <{header}>" for header in ("Python.h", "structmember.h", *HEADERS.split())]
    lines += [f"#undef {name}" for name in undefined.split()]
    lines += [f"#pragma GCC poison {missing}", defined]
    pretence = tmp_path / "pretence.h"
    pretence.write_text("\n".join(lines))
    files = [path for path in SOURCES if path.suffix == ".c"]
    include = sysconfig.get_path("include")
    command = [*compiler, "-std=gnu11", "-Wall", "-Wextra", "-fsyntax-only", '-DPOSIX_IPC_VERSION=""', f"-I{include}"]
    told = subprocess.run([*command, "-include", pretence, *files], capture_output=True, text=True)
    faults = [line for line in told.stderr.splitlines() if re.search(r"\b(error|warning):", line)]
    if any("Python.h" in fault for fault in faults):
        pytest.skip("no headers of Python")
    assert faults == []


# ---- the lint itself ----

FAULTY_LOCKS = {
    "no end": "Py_BEGIN_ALLOW_THREADS\nwait();\n",
    "no beginning": "wait();\nPy_END_ALLOW_THREADS\n",
    "two beginnings": "Py_BEGIN_ALLOW_THREADS\nPy_BEGIN_ALLOW_THREADS\nPy_END_ALLOW_THREADS\nPy_END_ALLOW_THREADS\n",
    "return": "Py_BEGIN_ALLOW_THREADS\nif (wait()) {\nreturn;\n}\nPy_END_ALLOW_THREADS\n",
    "goto": "Py_BEGIN_ALLOW_THREADS\ngoto error;\nPy_END_ALLOW_THREADS\n",
    "break out": "for (;;) {\nPy_BEGIN_ALLOW_THREADS\nbreak;\nPy_END_ALLOW_THREADS\n}\n",
    "call of Python": "Py_BEGIN_ALLOW_THREADS\nPyErr_NoMemory();\nPy_END_ALLOW_THREADS\n",
    "reference count": "Py_BEGIN_ALLOW_THREADS\nPy_INCREF(self);\nPy_END_ALLOW_THREADS\n",
    "raising": "Py_BEGIN_ALLOW_THREADS\nraise_errno(errno);\nPy_END_ALLOW_THREADS\n",
    "raising at second hand": "Py_BEGIN_ALLOW_THREADS\nhelper();\nPy_END_ALLOW_THREADS\n",
    "section without the lock": "Py_BEGIN_ALLOW_THREADS\nread_it();\nPy_END_ALLOW_THREADS\n",
    "section without end": "Py_BEGIN_CRITICAL_SECTION(self);\nx = 1;\n",
    "return from a section": "Py_BEGIN_CRITICAL_SECTION(self);\nreturn;\nPy_END_CRITICAL_SECTION();\n",
    "goto from a section": "Py_BEGIN_CRITICAL_SECTION(self);\ngoto error;\nPy_END_CRITICAL_SECTION();\n",
    "Python code in a section": "Py_BEGIN_CRITICAL_SECTION(self);\nPy_DECREF(x);\nPy_END_CRITICAL_SECTION();\n",
    "at second hand in a section": "Py_BEGIN_CRITICAL_SECTION(self);\nx = helper();\nPy_END_CRITICAL_SECTION();\n",
    "section in a section": "Py_BEGIN_CRITICAL_SECTION(self);\nread_it();\nPy_END_CRITICAL_SECTION();\n",
    "waiting in a section": "Py_BEGIN_CRITICAL_SECTION(self);\nwait_for_it();\nPy_END_CRITICAL_SECTION();\n",
}

RIGHT_LOCKS = """
Py_BEGIN_ALLOW_THREADS /* PyErr_NoMemory() would be wrong */
do {
    error = function(PyBytes_AS_STRING(name), "PyErr_NoMemory()") < 0 ? errno : 0;
    if (error == 0) {
        break;
    }
} while (error == EINTR);
for (int i = 0; i < 2; i++) continue;
Py_END_ALLOW_THREADS
Py_BEGIN_CRITICAL_SECTION(self);
Py_XINCREF(self->name);
plain();
Py_END_CRITICAL_SECTION();
return PyErr_NoMemory();
"""

HELPERS = """
static int
helper(void)
{
    return second(1);
}

static int
second(int a, int b)
{
    PyErr_Clear();
}

void
read_it(void)
{
    Py_BEGIN_CRITICAL_SECTION(self);
    Py_END_CRITICAL_SECTION();
}

void
wait_for_it(void)
{
    Py_BEGIN_ALLOW_THREADS
    Py_END_ALLOW_THREADS
}

void
plain(void)
{
    x++;
}
"""


def lint_body(body):
    function = f"static PyObject *\ntested(PyObject *self,\n       int x)\n{{\n{textwrap.indent(body, '    ')}}}\n"
    return check_locks({"x.c": blank(HELPERS + function)})


@pytest.mark.parametrize("fault", FAULTY_LOCKS)
def test_lint_sees_a_faulty_lock(fault):
    found = lint_body(FAULTY_LOCKS[fault])
    assert found
    assert all(each.startswith("x.c: tested: ") for each in found)


def test_lint_accepts_right_locks():
    assert lint_body(RIGHT_LOCKS) == []


def test_lint_sees_a_lock_outside_functions():
    assert check_locks({"x.c": "#define LOCK\nint f(void) {\nPy_BEGIN_ALLOW_THREADS\nPy_END_ALLOW_THREADS\n}\n"})


FAULTY_STATE = [
    "static PyObject *cache;",
    "PyObject *cache = NULL;",
    "static PyObject *\nf(void)\n{\n    static PyObject *name = NULL;\n    return name;\n}\n",
    "static int counter;",
    "int counter = 3;",
    "static const char *last_name;",
    "static const char *names[] = {0};",
    "static struct timespec last;",
    "static struct { int x; } all = {1};",
    "static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;",
    "static void (*handler)(int);",
    "static int\nf(void)\n{\n    static int calls = 0;\n    return ++calls;\n}\n",
    "static int\nf(void)\n{\n    static const char *names[] = {0};\n    return 0;\n}\n",
    "static int\nf(void)\n{\n    static char buffer[10];\n    return 0;\n}\n",
]

RIGHT_STATE = [
    "static const int table[] = {1, 2};",
    "static const char *const names[] = {0};",
    "static const struct { int x; } all[] = {{1}, {2}};",
    "static struct PyModuleDef module = {0};",
    "static PyMethodDef methods[] = {{0}, {1}};",
    "PyType_Spec spec = {.name = 0};",
    "extern PyType_Spec spec;",
    "typedef struct { int x; char *y; } Point;",
    "typedef struct Point Point;",
    "struct Point { int x; };",
    "struct Point;",
    "enum { A = 1, B = 2 };",
    "int function(PyObject *self, const char *text);",
    "static PyObject *\nfunction(PyObject *self)\n{\n    int x = 1;\n    static const int y = 2;\n    return 0;\n}\n",
    "PyObject *other(State *state, int (*function)(const char *));",
    "typedef int (*Function)(State *, int);",
]


@pytest.mark.parametrize("source", FAULTY_STATE)
def test_lint_sees_state_of_no_module(source):
    assert check_state({"x.c": blank(source)})


@pytest.mark.parametrize("source", RIGHT_STATE)
def test_lint_accepts_constants_and_types(source):
    assert check_state({"x.c": blank(source)}) == []
