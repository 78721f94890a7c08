"""What runs inside the sandbox, before and around the program: Python's library alone.

`sandbox` hands the text of this file to a fresh interpreter. It gives up rights, sets
limits, and then becomes the program. From then on nothing here is to be relied upon:
the program can change all of it, and so it knows nothing that the program may not know.
"""

import builtins
import ctypes
import json
import linecache
import os
import platform
import resource
import struct
import sys
import traceback
import types
from typing import Any

# Of x86_64 and aarch64; None where an architecture has no such call.
_REFUSED = {
    # Processes: there is one, and none but itself is its business.
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # Others, on this machine or not.
    "socket": (41, 198),
    "socketpair": (53, 199),
    # Memory that outlives what holds it.
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Of files, what landlock leaves.
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    # Doors into the kernel that only administrators and attackers use.
    "io_uring_setup": (425, 425),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "personality": (135, 92),
    "syslog": (103, 116),
}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_OF_ITSELF = {  # refused for another process; whether 0 means the caller
    "kill": (62, 129, False),
    "tgkill": (234, 131, False),
    "prlimit64": (302, 261, True),
    "sched_setaffinity": (203, 122, True),
}
_COMMANDS = {  # refused with one of these as their first or second argument
    "fcntl": (72, 25, 1, (8, 10, 15)),  # F_SETOWN, F_SETSIG, F_SETOWN_EX
    "prctl": (157, 167, 0, (1,)),  # PR_SET_PDEATHSIG
}
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_EPERM, _ENOSYS = 1, 38
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_CLONE_THREAD, _X32 = 0x00010000, 0x40000000


def seccomp_filter(machine: str, pid: int) -> bytes | None:
    """The program in the kernel's packet-filter language, or None.

    Args:
      machine: as `platform.machine` says.
      pid: of the process that it is for.

    >>> len(seccomp_filter("x86_64", 1)) % 8, seccomp_filter("mips", 1)
    (0, None)
    """
    if machine not in _ARCHITECTURES:
        return None
    column, architecture = _ARCHITECTURES[machine]
    refuse = (_RETURN, 0, 0, _ERRNO | _EPERM)
    allow = (_RETURN, 0, 0, _ALLOW)
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL)]
    code += [(_LOAD, 0, 0, 0), (_AT_LEAST, 0, 1, _X32), refuse]
    for numbers in _REFUSED.values():
        if (number := numbers[column]) is not None:
            code += [(_EQUAL, 0, 1, number), refuse]
    # glibc falls back to clone, whose flags a filter can see.
    code += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    code += [(_EQUAL, 0, 4, _CLONE[column]), (_LOAD, 0, 0, 16)]
    code += [(_BITS, 0, 1, _CLONE_THREAD), allow, refuse]
    for *call, zero in _OF_ITSELF.values():
        code += [(_EQUAL, 0, 5, call[column]), (_LOAD, 0, 0, 16)]
        code += [(_EQUAL, 1, 0, pid), (_EQUAL, 0, 1, 0 if zero else pid)]
        code += [allow, refuse]
    for *call, place, commands in _COMMANDS.values():
        count = len(commands)
        code += [(_EQUAL, 0, count + 3, call[column]), (_LOAD, 0, 0, 16 + 8 * place)]
        code += [(_EQUAL, count - i, 0, which) for i, which in enumerate(commands)]
        code += [allow, refuse]
    code.append(allow)
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def _call(function: str, *arguments: int | bytes | None) -> int:
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = getattr(ctypes.CDLL(None, use_errno=True), function)(*wide)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _seccomp() -> None:
    code = seccomp_filter(platform.machine(), os.getpid())
    if code is None:
        raise OSError(f"no filter of system calls is known for {platform.machine()}")
    kept = ctypes.create_string_buffer(code, len(code))
    what = struct.pack("@HxxxxxxQ", len(code) // 8, ctypes.addressof(kept))
    _call("prctl", 22, 2, what)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _landlock(readable: list[str]) -> None:
    """Leaves reading of some files and folders, and writing nowhere.

    Rights, rules about ports and scopes as the kernel's version knows them: 444 to 446
    are landlock_create_ruleset, landlock_add_rule and landlock_restrict_self.
    """
    version = _call("syscall", 444, None, 0, 1)
    rights = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1
    handled = struct.pack("=QQQ", rights, 3 * (version >= 4), 3 * (version >= 6))
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _call("syscall", 444, handled[:size], size, 0)
    for path in readable:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = 13 if os.path.isdir(path) else 5  # execute, read files, read folders
        _call("syscall", 445, rules, 1, struct.pack("=Qi", allowed, folder), 0)
        os.close(folder)
    _call("syscall", 446, rules, 0)
    os.close(rules)


def confine(job: dict[str, Any]) -> None:
    """Gives up what the program must not have."""
    user = job["user"]
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    for name, most in job["limits"].items():
        kind = getattr(resource, name)
        if (already := resource.getrlimit(kind)[1]) != resource.RLIM_INFINITY:
            most = min(most, already)
        resource.setrlimit(kind, (most, most))
    _call("prctl", 1, 9)  # dies with its parent
    _call("prctl", 38, 1, 0, 0, 0)  # no new privileges
    if job["level"] == "kernel":
        _landlock(job["readable"])
        _seccomp()
    elif job["level"] == "required" and platform.machine() in _ARCHITECTURES:
        _seccomp()


_PRELUDE = """
import bisect, collections, functools, heapq, itertools, math, operator, random, re
import string, sys
from typing import *
from collections import *
from functools import *
from heapq import *
from bisect import *
from itertools import *
from math import *
"""


def main(descriptor: int, ready: int) -> None:
    """Becomes the program."""
    with open(descriptor, "rb") as file:
        job = json.loads(file.read())
    source, call = job["program"], job["call"]
    result = -1
    if call is not None:  # what is printed is no result
        result = os.dup(1)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
    confine(job)
    os.write(ready, b"1")
    os.close(ready)
    # What a function's author runs under `if __name__ == "__main__"` is not asked for.
    module = types.ModuleType("__main__" if call is None else "solution")
    sys.modules[module.__name__], sys.argv[:] = module, ["solution.py"]
    lines = source.splitlines(keepends=True)
    linecache.cache["solution.py"] = (len(source), None, lines, "solution.py")
    names, dumps, leave, write = module.__dict__, json.dumps, os._exit, os.write
    if call is not None:
        exec(_PRELUDE, names)
        for name in set(names) & set(vars(builtins)) - {"__name__", "__doc__"}:
            del names[name]  # math's pow is not everybody's
    try:
        exec(compile(source, "solution.py", "exec"), names)
        if call is None:
            return
        name, arguments = call
        holder = names["Solution"]() if "Solution" in names else module
        if not hasattr(holder, name):
            sys.exit(f"there is no function {name!r}")
        left = memoryview(dumps(getattr(holder, name)(*arguments)).encode())
        while left:
            left = left[write(result, left) :]
    except Exception as error:
        frames = error.__traceback__.tb_next if error.__traceback__ else None
        traceback.print_exception(type(error), error, frames)
        sys.exit(1)
    leave(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
