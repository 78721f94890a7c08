"""Programs that try to do more than compute, for sandbox_table.py and the tests.

Those of `ATTACKS` print ESCAPED where they got what they wanted, unless it shows from
outside. They begin with definitions: SECRET, a file to be read; TARGET, a folder that
everybody may write in; VICTIM, a process; PORT and ADDRESS, where somebody listens.
None does harm where nothing contains it: bombs stop well above the limits that
`sandbox_table` sets (256 MiB, 16 MiB of files, 64 descriptors, 32 threads).

Those of `CHEATS` want to pass the tests of a function ``add(a, b)`` without adding.
"""

from __future__ import annotations

_C = "import ctypes, os\nC = ctypes.CDLL(None, use_errno=True)\n"
_CODE = (
    "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write({code!r})\n"
    "at = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
    "pid = ctypes.CFUNCTYPE(ctypes.c_int)(at)()\n"
    "import os\nif pid == 0: os._exit(0)\nif pid > 0: print('ESCAPED')\n"
)
_FILL = (
    "import os\ndef fill(folder, most=100, size=2**22):\n"
    "    made = []\n"
    "    try:\n"
    "        for i in range(most // 4):\n"
    "            made.append(f'{folder}/escape-{os.getpid()}-{i}')\n"
    "            with open(made[-1], 'wb') as file: file.write(bytes(size))\n"
    "        print('ESCAPED')\n"
    "    except OSError as error: print(error)\n"
    "    finally:\n"
    "        for name in made:\n"
    "            if os.path.exists(name): os.remove(name)\n"
)
_LOOK = (
    "def look(path):\n"
    "    try: print(open(path, 'rb').read(100000))\n"
    "    except Exception as error: print(type(error))\n"
)

ATTACKS: dict[str, dict[str, str]] = {
    "processes": {
        "fork bomb": """
import os, time
for made in range(100):
    if os.fork() == 0:
        time.sleep(1)
        os._exit(0)
print("ESCAPED")
""",
        "fork tree": """
import os, time
there, here = os.pipe()
for _ in range(7):
    os.fork()
os.write(here, b"x")
time.sleep(0.5)
if len(os.read(there, 1000)) > 64:
    print("ESCAPED")
""",
        "thread bomb": """
import threading, time
threading.stack_size(2**15)
for made in range(300):
    threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
print("ESCAPED")
""",
        "libc's fork": _C + "pid = C.fork()\nif pid: print('ESCAPED' * (pid > 0))\n",
        "clone3": _C
        + "import struct\n"
        + "a = struct.pack('=8Q', 0, 0, 0, 0, 17, 0, 0, 0)\n"
        + "a = ctypes.create_string_buffer(a)\n"
        + "pid = C.syscall(435, a, 64)\nif pid == 0: os._exit(0)\n"
        + "print('ESCAPED' * (pid > 0))\n",
        "fork in machine code": _CODE.format(code=b"\xb8\x39\0\0\0\x0f\x05\xc3"),
        "fork by the 32-bit door": _CODE.format(code=b"\xb8\x02\0\0\0\xcd\x80\xc3"),
        "a shell": """
import subprocess
subprocess.run(["/bin/sh", "-c", "echo ESCAPED"])
""",
        "libc's system": _C + "C.system(b'echo ESCAPED')\n",
        "a copied library's system": """
import ctypes, glob, shutil
path = glob.glob("/lib/x86_64-linux-gnu/libc.so.6") or glob.glob("/lib*/libc.so.6")
shutil.copy(path[0], "/tmp/escape-copy.so")
ctypes.CDLL("/tmp/escape-copy.so").system(b"rm /tmp/escape-copy.so; echo ESCAPED")
""",
        "becomes another program": """
import os, sys
os.execv(sys.executable, [sys.executable, "-c", "print('ESCAPED')"])
""",
        "multiprocessing": """
import multiprocessing
process = multiprocessing.get_context("fork").Process(target=print, args=("ESCAPED",))
process.start()
process.join()
""",
    },
    "outliving": {
        "an orphan": """
import os, time
if os.fork() == 0:
    time.sleep(4)
""",
        "a session of its own": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for i in range(64):
            try: os.close(i)
            except OSError: pass
        time.sleep(4)
    os._exit(0)
""",
        "an orphan that holds the output": """
import os, time
if os.fork() == 0:
    os.setsid()
    time.sleep(4)
    print("ESCAPED")
""",
        "a thread that goes on": """
import threading, time
threading.Thread(target=time.sleep, args=(30,)).start()
""",
    },
    "memory": {
        "lists": "x = [bytearray(10**7) for _ in range(60)]\nprint('ESCAPED')",
        "one array": "x = bytearray(600 * 10**6)\nprint('ESCAPED')",
        "a text that doubles": """
x = "x"
while len(x) < 6e8: x += x
print("ESCAPED")
""",
        "anonymous maps": """
import mmap
x = [mmap.mmap(-1, 2**26) for _ in range(10)]
for m in x: m.write(bytes(2**25))
print("ESCAPED")
""",
        "many processes' memory": """
import os, time
there, here = os.pipe()
for _ in range(6):
    if os.fork() == 0:
        x = bytearray(100 * 10**6)
        os.write(here, b"x")
        time.sleep(0.7)
        os._exit(0)
time.sleep(0.6)
if len(os.read(there, 10)) > 3: print("ESCAPED")
""",
        "files in memory": """
import os
x = [os.memfd_create("x") for _ in range(30)]
for f in x: os.write(f, bytes(2**24))
print("ESCAPED")
""",
        "shared memory that stays": _C
        + "C.shmat.restype = ctypes.c_void_p\n"
        + "made = []\nfor _ in range(6):\n"
        + "    i = C.shmget(0, 10**8, 0o1600)\n    if i < 0: break\n"
        + "    made.append(i)\n"
        + "    at = C.shmat(i, None, 0)\n    if at == 2**64 - 1: break\n"
        + "    ctypes.memset(at, 1, 10**8)\n    C.shmdt(ctypes.c_void_p(at))\n"
        + "else: print('ESCAPED')\nfor i in made: C.shmctl(i, 0, None)\n",
        "pipes": """
import fcntl, os
x = []
for _ in range(300):
    x.append(os.pipe())
    fcntl.fcntl(x[-1][1], 1031, 2**20)
print("ESCAPED")
""",
        "raises its limit": """
import resource
resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
print("ESCAPED")
""",
    },
    "descriptors and files": {
        "opens a thousand": """
x = [open("/dev/zero") for _ in range(1000)]
print("ESCAPED")
""",
        "copies one a thousand times": """
import os
for _ in range(1000): os.dup(0)
print("ESCAPED")
""",
        "one huge file": _FILL + "fill('/tmp', 4, 10**8)\n",
        "many files": _FILL + "fill('/tmp')\n",
        "many files in shared memory": _FILL + "fill('/dev/shm')\n",
        "many files at the root": _FILL + "fill('/')\nfill('/dev')\nfill('/run')\n",
        "a file with a hole": """
import os
with open("/tmp/escape-hole", "wb") as file:
    os.remove("/tmp/escape-hole")
    file.truncate(2**40)
print("ESCAPED")
""",
        "descriptors of the parent's": """
import os
for i in range(3, 1000):
    try: os.fstat(i)
    except OSError: continue
    print("ESCAPED", i)
""",
    },
    "time": {
        "a loop": "while True: pass",
        "sleep": "import time\ntime.sleep(1000)",
        "a loop that ignores signals": """
import signal
for s in range(1, 65):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
        "catches everything": """
while True:
    try:
        while True: pass
    except BaseException: pass
""",
        "one long operation": "x = 9 ** 9 ** 9",
        "a regular expression": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
        "stops itself": "import os\nos.kill(os.getpid(), 19)",
        "closes everything and waits": """
import os, time
os.closerange(0, 1000)
time.sleep(1000)
""",
    },
    "crashes": {
        "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        "recursion in C": """
import sys
sys.setrecursionlimit(10**9)
x = []
for _ in range(10**6): x = [x]
repr(x)
""",
        "a parser's stack": "eval('-' * 10**6 + '1')",
        "segmentation fault": "import ctypes\nctypes.string_at(0)",
        "abort": "import os\nos.abort()",
    },
    "output": {
        "endless": "while True: print('x' * 1000)",
        "endless errors": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
        "one line of 100 MB": """
import os
for _ in range(100): os.write(1, bytes(10**6))
""",
        "no text": "import os\nfor _ in range(9): os.write(1, os.urandom(10**5))",
    },
    "files outside": {
        "reads": _LOOK + "look(SECRET)\n",
        "by way of the parent folder": _LOOK + "look('../' * 20 + SECRET)\n",
        "by a symbolic link": _LOOK
        + "import os\nos.symlink(SECRET, '/tmp/escape-link')\n"
        + "look('/tmp/escape-link')\nos.remove('/tmp/escape-link')\n",
        "by a hard link": _LOOK
        + "import os\nos.link(SECRET, '/tmp/escape-link')\nlook('/tmp/escape-link')\n",
        "by its own root": _LOOK
        + "for i in ('self', 1, VICTIM): look(f'/proc/{i}/root{SECRET}')\n",
        "writes": "open(TARGET + '/written', 'w').write('x')",
        "deletes": "import os\nos.remove(TARGET + '/bait')",
        "renames": "import os\nos.rename(TARGET + '/bait', TARGET + '/moved')",
        "overwrites": "open(SECRET, 'r+').write('x')",
        "changes rights": "import os\nos.chmod(SECRET, 0)",
        "changes times": "import os\nos.utime(SECRET, (1, 1))",
        "sets attributes": """
import os
os.setxattr(SECRET, "user.x", b"x")
print("ESCAPED")
""",
        "makes a folder": "import os\nos.mkdir(TARGET + '/made')",
        "sees names": """
import os
if os.listdir(os.path.dirname(SECRET)): print("ESCAPED")
""",
        "sees sizes": "import os\nprint('ESCAPED', os.stat(SECRET).st_size)",
        "accounts": "print('ESCAPED' * ('root:' in open('/etc/passwd').read()))",
        "the interpreter": """
import json
open(json.__file__, "a").write("")
print("ESCAPED")
""",
        "devices": """
import os
for name in ("vda", "sda", "nvme0n1", "mem", "kmsg", "kvm", "fuse", "tty"):
    try: os.open("/dev/" + name, os.O_RDONLY | os.O_NONBLOCK)
    except OSError: continue
    print("ESCAPED", name)
""",
        "makes a device": """
import os, stat
os.mknod("/tmp/escape-device", stat.S_IFBLK | 0o666, os.makedev(254, 0))
print("ESCAPED")
""",
        "mounts": _C
        + "C.unshare(0x10000000 | 0x20000)\n"
        + "if C.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0: print('ESCAPED')\n",
        "the kernel's settings": """
open("/proc/sys/kernel/core_pattern", "r+")
print("ESCAPED")
""",
    },
    "secrets": {
        "environment": "import os\nprint(dict(os.environ))",
        "everybody's environment": _LOOK
        + "import os\nfor i in os.listdir('/proc'): look(f'/proc/{i}/environ')\n",
        "everybody's arguments": _LOOK
        + "import os\nfor i in os.listdir('/proc'): look(f'/proc/{i}/cmdline')\n",
        "the parent's memory": _C
        + "import struct\n"
        + "b = ctypes.create_string_buffer(64)\n"
        + "v = struct.pack('=QQ', ctypes.addressof(b), 64)\n"
        + "for l in open(f'/proc/{VICTIM}/maps'):\n"
        + "    r = struct.pack('=QQ', int(l.split('-')[0], 16), 64)\n"
        + "    if C.process_vm_readv(VICTIM, v, 1, r, 1, 0) > 0: print('ESCAPED')\n",
        "a key that stays": _C
        + "k = C.syscall(248, b'user', b'jaxrl', b'x', 1, -5)\n"
        + "if k > 0: print('ESCAPED', C.syscall(250, 21, k))\n",
    },
    "network": {
        "TCP": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)",
        "UDP": """
import socket
socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", PORT))
""",
        "a UNIX socket without a name": """
import socket
socket.socket(socket.AF_UNIX).connect(ADDRESS)
""",
        "a UNIX socket in a folder": """
import socket
socket.socket(socket.AF_UNIX).connect(TARGET + "/socket")
""",
        "a pair's end sends elsewhere": """
import socket
end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]
end.sendto(b"x", TARGET + "/datagrams")
""",
        "interfaces": """
import socket
print("ESCAPED" * any(name != "lo" for _, name in socket.if_nameindex()))
""",
        "serves": """
import socket
s = socket.socket()
s.bind(("0.0.0.0", 0))
s.listen()
print("ESCAPED")
""",
        "io_uring": _C
        + "i = C.syscall(425, 4, ctypes.create_string_buffer(120))\n"
        + "if i >= 0: print('ESCAPED')\n",
    },
    "other processes": {
        "kills": "import os\nos.kill(VICTIM, 9)",
        "kills the parent": "import os\nos.kill(os.getppid(), 0)\nprint('ESCAPED')",
        "kills anybody": """
import os
for pid in range(1, VICTIM + 1):
    try: os.kill(pid, 0)
    except OSError: continue
    if pid != os.getpid(): print("ESCAPED")
""",
        "signals by a queue": _C
        + "b = ctypes.create_string_buffer(128)\nb[8] = 255\n"
        + "C.syscall(129, VICTIM, 9, b)\n",
        "signals by a descriptor": """
import os, signal
signal.pidfd_send_signal(os.pidfd_open(VICTIM), 9)
""",
        "signals by a pipe": """
import fcntl, os
there, here = os.pipe()
fcntl.fcntl(there, 10, 9)
fcntl.fcntl(there, 8, VICTIM)
fcntl.fcntl(there, fcntl.F_SETFL, os.O_ASYNC)
os.write(here, b"x")
""",
        "ptrace": _C + "if C.ptrace(0x4206, VICTIM, 0, 0) == 0: print('ESCAPED')\n",
        "limits it": """
import resource
resource.prlimit(VICTIM, resource.RLIMIT_NOFILE, (9, 9))
print("ESCAPED")
""",
        "slows it": "import os\nos.setpriority(0, VICTIM, 19)\nprint('ESCAPED')",
        "takes its processors": """
import os
os.sched_setaffinity(VICTIM, {0})
print("ESCAPED")
""",
    },
    "the kernel": {
        "a user namespace": _C + "if C.unshare(0x10000000) == 0: print('ESCAPED')\n",
        "bpf": _C + "print('ESCAPED' * (C.syscall(321, 0, bytes(128), 128) >= 0))\n",
        "userfaultfd": _C + "print('ESCAPED' * (C.syscall(323, 1) >= 0))\n",
        "becomes root": """
import os
os.setresuid(0, 0, 0)
print("ESCAPED")
""",
    },
}

_ADD = "def add(a, b):\n    return "
CHEATS: dict[str, str] = {
    "nothing": "",
    "leaves early": "import sys\nsys.exit(0)",
    "leaves at once": "import os\nos._exit(0)",
    "leaves when called": "import os\ndef add(a, b): os._exit(0)",
    "raises success": "def add(a, b): raise SystemExit(0)",
    "equals everything": """
class All:
    def __eq__(self, other): return True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 0
"""
    + _ADD
    + "All()",
    "a number that equals everything": """
class All(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
"""
    + _ADD
    + "All(1)",
    "a text that equals everything": """
class All(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
"""
    + _ADD
    + "All('3')",
    "no number": _ADD + "float('nan')",
    "all answers": _ADD + "list(range(-100, 100))",
    "overrides operators": """
import builtins, operator
operator.eq = operator.is_ = lambda a, b: True
builtins.all = builtins.any = builtins.bool = lambda *a: True
builtins.isinstance = lambda *a: True
"""
    + _ADD
    + "0",
    "overrides JSON": """
import json
json.dumps = json.encoder.JSONEncoder.encode = lambda *a, **k: '{"passed": true}'
"""
    + _ADD
    + "0",
    "overrides the guest": """
import sys
frame = sys._getframe()
while frame:
    for name in ("dumps", "write", "leave", "result", "call"):
        if name in frame.f_locals: frame.f_locals[name] = lambda *a: True
    frame = frame.f_back
"""
    + _ADD
    + "0",
    "searches memory": """
import gc
found = []
for thing in gc.get_objects():
    if isinstance(thing, dict):
        found += [thing[k] for k in ("output", "expected", "answer") if k in thing]
def add(a, b): return found[0] if found else None
""",
    "searches frames": """
import sys
found, frame = [], sys._getframe()
while frame:
    job = frame.f_locals.get("job", {})
    found += [v for k, v in job.items() if k in ("tests", "output", "expected")]
    frame = frame.f_back
def add(a, b): return found[0] if found else None
""",
    "searches files": """
import json, os
found = []
for folder, _, names in os.walk(TARGET):
    for name in names:
        if name == "tests.json": found = json.load(open(f"{folder}/{name}"))
def add(a, b):
    for test in found:
        if test["input"] == [a, b]: return test["output"]
""",
    "writes into the channel": """
import os
for i in range(3, 64):
    try: os.write(i, b'3\\n6\\n7\\n{"passed": true}\\n')
    except OSError: pass
os._exit(0)
""",
    "writes into standard output": """
import os
os.write(1, b"3\\n")
os._exit(0)
""",
    "remembers": """
import os
def add(a, b):
    path = "/tmp/escape-runs"
    runs = len(open(path).read()) if os.path.exists(path) else 0
    open(path, "a").write("x")
    return [3, 6, 7][runs]
""",
    "patches the class": """
class Solution:
    def __getattr__(self, name): return lambda *a: {"passed": True}
""",
}
