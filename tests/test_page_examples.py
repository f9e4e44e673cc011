# ruff: noqa: W293 - the page has blanks on its empty lines
"""The usage examples of the requirement page for SharedMemory, run as they are written there.

One character is changed: "Memory Mapping for High Performance" assigns nine bytes to eight, an IndexError on any
implementation; here it assigns eight.
"""

import contextlib
import fcntl
import os
import re
import tempfile

import pytest
from support import SHARED_MEMORY, private_ipc, run_python

# Basic Shared Memory Usage
BASIC_USAGE = """\
import posix_ipc
import os

# Create a 1KB shared memory segment
shm = posix_ipc.SharedMemory('/my_shm', posix_ipc.O_CREAT, size=1024)

# Write data using file descriptor
data = b'Hello, shared memory!'
os.write(shm.fd, data)

# Read data back
os.lseek(shm.fd, 0, os.SEEK_SET)  # Reset to beginning
read_data = os.read(shm.fd, len(data))
print(f"Read: {read_data.decode()}")

# Clean up
shm.close_fd()
shm.unlink()
"""

# Memory Mapping for High Performance
MEMORY_MAPPING = """\
import posix_ipc
import mmap
import struct

# Create shared memory segment
shm = posix_ipc.SharedMemory('/mapped_shm', posix_ipc.O_CREAT, size=4096)

# Memory map the segment
mm = mmap.mmap(shm.fd, shm.size)

# Write structured data directly to memory
mm[0:4] = struct.pack('i', 42)        # Write integer at offset 0
mm[4:12] = b'Hello!!!'                # Write string at offset 4

# Read structured data
value = struct.unpack('i', mm[0:4])[0]  # Read integer
text = mm[4:12].rstrip(b'!')           # Read string

print(f"Value: {value}, Text: {text.decode()}")

# Clean up
mm.close()
shm.close_fd()
shm.unlink()
"""

# Multi-Process Data Sharing
MULTI_PROCESS = r"""
import posix_ipc
import mmap
import os
import time

# Producer process
def producer():
    # Create shared memory
    shm = posix_ipc.SharedMemory('/data_shm', posix_ipc.O_CREAT, size=1024)
    mm = mmap.mmap(shm.fd, shm.size)
    
    # Write data periodically
    for i in range(10):
        data = f"Message {i}".encode()
        mm[0:len(data)] = data
        mm[len(data)] = 0  # Null terminator
        time.sleep(1)
    
    mm.close()
    shm.close_fd()
    # Don't unlink - consumer will do it

# Consumer process
def consumer():
    # Open existing shared memory
    try:
        shm = posix_ipc.SharedMemory('/data_shm')
        mm = mmap.mmap(shm.fd, shm.size)
        
        # Read data
        for i in range(10):
            # Find null terminator
            null_pos = mm.find(b'\x00')
            if null_pos > 0:
                data = mm[0:null_pos].decode()
                print(f"Consumer read: {data}")
            time.sleep(1)
        
        mm.close()
        shm.close_fd()
        shm.unlink()  # Consumer cleans up
        
    except posix_ipc.ExistentialError:
        print("Shared memory not found")
"""

# Using with Different Size Operations
DIFFERENT_SIZES = """\
import posix_ipc
import os

# Create segment with initial size
shm = posix_ipc.SharedMemory('/resizable_shm', posix_ipc.O_CREAT, size=512)
print(f"Initial size: {shm.size}")

# Resize using os.ftruncate() (alternative to size parameter)
os.ftruncate(shm.fd, 2048)
print(f"Resized to: {shm.size}")

# Note: On macOS, you can only call ftruncate() once per segment lifetime

shm.close_fd()
shm.unlink()
"""

# Read-Only Access
READ_ONLY = """\
import posix_ipc
import mmap

# First process creates and writes data
shm_writer = posix_ipc.SharedMemory('/readonly_shm', posix_ipc.O_CREAT, size=1024)
mm_writer = mmap.mmap(shm_writer.fd, shm_writer.size)
mm_writer[0:12] = b'Hello World!'
mm_writer.close()
shm_writer.close_fd()

# Second process opens read-only
shm_reader = posix_ipc.SharedMemory('/readonly_shm', read_only=True)
mm_reader = mmap.mmap(shm_reader.fd, shm_reader.size, access=mmap.ACCESS_READ)

# Read data
data = mm_reader[0:12]
print(f"Read: {data.decode()}")

# Clean up
mm_reader.close()
shm_reader.close_fd()
posix_ipc.unlink_shared_memory('/readonly_shm')
"""

# Error Handling
ERROR_HANDLING = """\
import posix_ipc

try:
    # Try to open non-existent shared memory
    shm = posix_ipc.SharedMemory('/nonexistent')
except posix_ipc.ExistentialError:
    print("Shared memory does not exist")

try:
    # Try to create exclusive segment that already exists
    shm1 = posix_ipc.SharedMemory('/existing', posix_ipc.O_CREAT)
    shm2 = posix_ipc.SharedMemory('/existing', posix_ipc.O_CREX)
except posix_ipc.ExistentialError:
    print("Shared memory already exists")
    shm1.close_fd()
    shm1.unlink()

try:
    # Try to access segment without proper permissions
    shm = posix_ipc.SharedMemory('/restricted', posix_ipc.O_CREAT, mode=0o000)
    # Another process without permissions would get PermissionsError
except posix_ipc.PermissionsError:
    print("Permission denied")
"""

# ---- running them ----

NAMES = (
    *("/my_shm", "/mapped_shm", "/data_shm", "/resizable_shm", "/readonly_shm"),
    *("/nonexistent", "/existing", "/restricted"),
)

# The producer in a process of its own, and the seconds of both made short.
BOTH_PROCESSES = """
import os
seconds = time.sleep
time.sleep = lambda pause: seconds(pause / 50)
child = os.fork()
if child == 0:
    producer()
    os._exit(0)
while not os.path.exists("/dev/shm/data_shm") or not open("/dev/shm/data_shm", "rb").read(1).strip(b"\\0"):
    seconds(0.001)
consumer()
assert os.waitpid(child, 0)[1] == 0
"""

WHAT_IS_LEFT = """
import os
print("left:", [name for name in sys.argv[1:] if os.path.exists("/dev/shm" + name)])
"""


@pytest.fixture
def run_example():
    """Return a function that runs an example, prints the names it leaves, and has them removed.

    The names are fixed, so an example gets a /dev/shm of its own; where that is barred, it waits for its turn.
    """
    with contextlib.ExitStack() as stack:
        if private_ipc() is None:
            lock = stack.enter_context(open(os.path.join(tempfile.gettempdir(), "posix_ipc-page-examples.lock"), "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name in NAMES:
                if SHARED_MEMORY.exists(name):
                    pytest.skip(f"{name} belongs to somebody else")
                stack.callback(SHARED_MEMORY.remove, name)

        def run(example, more=""):
            code = f"{example}\n{more}\nimport sys\n{WHAT_IS_LEFT}"
            return run_python(code, *NAMES, prefix=private_ipc() or ()).stdout

        yield run


@pytest.mark.parametrize(
    ("example", "printed"),
    [
        pytest.param(BASIC_USAGE, "Read: Hello, shared memory!\nleft: []\n", id="basic usage"),
        pytest.param(MEMORY_MAPPING, "Value: 42, Text: Hello\nleft: []\n", id="memory mapping"),
        pytest.param(DIFFERENT_SIZES, "Initial size: 512\nResized to: 2048\nleft: []\n", id="different sizes"),
        pytest.param(READ_ONLY, "Read: Hello World!\nleft: []\n", id="read-only access"),
        pytest.param(
            ERROR_HANDLING,
            "Shared memory does not exist\nShared memory already exists\nleft: ['/restricted']\n",
            id="error handling",
        ),
    ],
)
def test_example(run_example, example, printed):
    assert run_example(example) == printed


@pytest.mark.slow
def test_example_of_two_processes(run_example):
    *lines, left = run_example(MULTI_PROCESS, BOTH_PROCESSES).splitlines()
    numbers = [int(re.fullmatch(r"Consumer read: Message (\d)", line).group(1)) for line in lines]
    assert len(numbers) == 10
    assert numbers == sorted(numbers)
    assert left == "left: []"
