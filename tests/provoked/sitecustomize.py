"""Note where FlextronError and JobFailed are made, as lines `PATH:LINE` in the file that FLEXTRON_MESSAGES names.

Python imports a module of this name by itself at the start of a process. The classes are watched as soon as their module is
imported; processes that do not import it stay as they are.
"""

import os
import sys

MODULE = "flextron_mcore.config"
OPEN = os.open  # kept, because a test may replace os.open


def note(code, line):
    """Append a line to the file of FLEXTRON_MESSAGES, if it is set.

    Args:
        code: code object that makes the error.
        line: number of the line, from 1.
    """
    if name := os.environ.get("FLEXTRON_MESSAGES"):
        file = OPEN(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(file, f"{code.co_filename}:{line}\n".encode())  # one write: lines of several processes do not mix
        os.close(file)


def watch(module):
    """Note every FlextronError and JobFailed from now on. module: flextron_mcore.config."""

    def init(self, *args):
        Exception.__init__(self, *args)
        caller = sys._getframe(1)
        note(caller.f_code, caller.f_lineno)

    module.FlextronError.__init__ = module.JobFailed.__init__ = init


class Finder:
    """Entry of sys.meta_path that calls `watch` on MODULE when it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != MODULE:
            return None
        import importlib.util

        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_watch(module):
            execute(module)
            watch(module)

        spec.loader.exec_module = execute_and_watch
        return spec


if __name__ == "sitecustomize" and "FLEXTRON_MESSAGES" in os.environ:
    sys.meta_path.insert(0, Finder())
