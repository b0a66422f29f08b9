"""Starts a program that ends when its parent does: `python -I -S child.py PARENT_PID PROGRAM ARGUMENT…`.

It asks the kernel to kill it when its parent ends (PR_SET_PDEATHSIG), which also holds for the program that it then
becomes. The parent may have ended before that, so its process id is compared. The kernel looks at the *thread* that
started the child, so whoever uses this starts children from a thread that lives as long as they shall.

What must never happen here: an import that takes time; a child that outlives its parent.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(words: list[str]) -> int:
    """Become the program, or say why not."""
    parent_pid, program = int(words[0]), words[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        sys.stderr.write(f"the kernel refuses PR_SET_PDEATHSIG: {os.strerror(ctypes.get_errno())}\n")
        return 126
    if os.getppid() != parent_pid:
        return 0
    try:
        os.execvp(program[0], program)
    except OSError as error:
        sys.stderr.write(f"{program[0]!r} cannot be started: {error.strerror}\n")
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
