"""The C extension of posix_ipc; everything else about the package stands in pyproject.toml.

Nothing is probed: what differs between systems is decided by the preprocessor. Three variables are for developers:

POSIX_IPC_DEVELOP=1             strict C11, and every warning is an error
POSIX_IPC_PORTABLE=1            leave out what only Linux has, to test on it what other systems get
POSIX_IPC_SANITIZE=address,...  build with -fsanitize=address,...
"""

import os
import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

compile_args = ["-fvisibility=hidden"]
link_args = []
macros = []

if os.environ.get("POSIX_IPC_DEVELOP"):
    compile_args += ["-std=c11", "-Wall", "-Wextra", "-Wshadow", "-Wstrict-prototypes", "-Wmissing-prototypes"]
    compile_args += ["-Wpointer-arith", "-Wwrite-strings", "-Wvla", "-Werror"]
if os.environ.get("POSIX_IPC_PORTABLE"):
    macros.append(("POSIX_IPC_PORTABLE", None))
if sanitizers := os.environ.get("POSIX_IPC_SANITIZE"):
    compile_args += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g"]
    link_args.append(f"-fsanitize={sanitizers}")


class BuildExt(build_ext):
    """Tells the C code its version, which pyproject.toml alone states."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.define = [*(self.define or []), ("POSIX_IPC_VERSION", f'"{self.distribution.get_version()}"')]


setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=[
        Extension(
            "posix_ipc._ext",
            sources=["posix_ipc/_ext.c", *sorted(glob("posix_ipc/_native/*.c"))],
            depends=["posix_ipc/_native/ext.h", "pyproject.toml", "setup.py"],
            define_macros=macros,
            extra_compile_args=compile_args,
            extra_link_args=link_args,
            # Before version 2.34 glibc kept segments and queues in librt and semaphores in libpthread.
            libraries=["rt", "pthread"] if sys.platform == "linux" else [],
        )
    ],
)
