"""The core in C; all else is in pyproject.toml. Without a compiler, hangwatch runs core.py."""

import sysconfig

from setuptools import Extension, setup

# Nor with a free-threaded interpreter, which has no stable ABI yet, and runs the core in Python.
HAS_GIL = not sysconfig.get_config_var("Py_GIL_DISABLED")
CORE = Extension(
    "hangwatch.worker._core",
    ["src/hangwatch/worker/_core.c"],
    py_limited_api=True,
    optional=True,
    extra_compile_args=["-O2", "-std=c11", "-Wall", "-Wextra", "-Wno-missing-field-initializers"],
)
setup(
    ext_modules=[CORE] if HAS_GIL else [],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if HAS_GIL else {},
)
