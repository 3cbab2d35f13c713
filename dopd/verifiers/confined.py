"""The inside of a sandbox: a program of its own, which locks itself in before it runs what nobody has read.

It imports nothing but Python's library, since it is started with `python -I -S` and cannot read dopd from
where it runs. It reads a JSON object from the file descriptor that its argument names, and is one of three:

- `program`: runs a source as a script; standard input and output are those of the process.
- `candidate`: runs a source, and lets another process call its functions over two pipes, with values that are data.
- `tests`: runs tests in which the names of the candidate are stand-ins that call it. What a test compares is data in
  this process, so nothing that the candidate does to itself (patched builtins, an `__eq__` that always holds, leaving
  the program, a line of success) reaches a verdict.

Locks, each of the process and of whatever it starts: resource limits; no capabilities and no new privileges; Landlock,
with which files are readable in Python's library and writable in one folder; seccomp, with which there are no sockets,
no other processes, no signals to others and no changes of files' owners, modes and times.
"""

import builtins
import contextlib
import ctypes
import io
import json
import os
import platform
import resource
import struct
import sys
from typing import Any

LOCK_FAILED = 97  # exit status of a process that could not lock itself in
EXPLAIN = "could not be locked in"

_NR_LANDLOCK, _NR_CAPSET = (444, 445, 446), {"x86_64": 126, "aarch64": 91}
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SIGKILL, _EPERM, _ENOSYS = 9, 1, 38
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Numbers that all architectures share.
_DENIED = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_open": 434,
    "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442, "memfd_secret": 447, "fchmodat2": 452,
    "setxattrat": 463, "removexattrat": 466,
}  # fmt: skip
_DENIED_OF = {
    "x86_64": {
        "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "kill": 62, "tkill": 200, "tgkill": 234,
        "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "ptrace": 101, "process_vm_readv": 310,
        "process_vm_writev": 311, "kcmp": 312, "socket": 41, "socketpair": 53, "bpf": 321, "perf_event_open": 298,
        "userfaultfd": 323, "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272, "setns": 308,
        "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "setrlimit": 160, "shmget": 29, "shmat": 30,
        "shmctl": 31, "semget": 64, "semop": 65, "semctl": 66, "semtimedop": 220, "msgget": 68, "msgsnd": 69,
        "msgrcv": 70, "msgctl": 71, "mq_open": 240, "mq_unlink": 241, "memfd_create": 319, "chmod": 90, "fchmod": 91,
        "fchmodat": 268, "chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260, "setxattr": 188, "lsetxattr": 189,
        "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "utime": 132, "utimes": 235,
        "futimesat": 261, "utimensat": 280, "truncate": 76, "name_to_handle_at": 303, "open_by_handle_at": 304,
        "fanotify_init": 300, "inotify_init": 253, "inotify_init1": 294, "inotify_add_watch": 254, "syslog": 103,
        "move_pages": 279, "migrate_pages": 256, "setpriority": 141, "sched_setaffinity": 203,
        "sched_setscheduler": 144, "sched_setparam": 142, "sched_setattr": 314, "ioprio_set": 251,
    },
    "aarch64": {
        "execve": 221, "execveat": 281, "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138,
        "rt_tgsigqueueinfo": 240, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272,
        "socket": 198, "socketpair": 199, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "add_key": 217,
        "request_key": 218, "keyctl": 219, "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41,
        "chroot": 51, "setrlimit": 164, "shmget": 194, "shmctl": 195, "shmat": 196, "semget": 190, "semctl": 191,
        "semtimedop": 192, "semop": 193, "msgget": 186, "msgctl": 187, "msgrcv": 188, "msgsnd": 189, "mq_open": 180,
        "mq_unlink": 181, "memfd_create": 279, "fchmod": 52, "fchmodat": 53, "fchownat": 54, "fchown": 55,
        "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16,
        "utimensat": 88, "truncate": 45, "name_to_handle_at": 264, "open_by_handle_at": 265, "fanotify_init": 262,
        "inotify_init1": 26, "inotify_add_watch": 27, "syslog": 116, "move_pages": 239, "migrate_pages": 238,
        "setpriority": 140, "sched_setaffinity": 122, "sched_setscheduler": 119, "sched_setparam": 118,
        "sched_setattr": 274, "ioprio_set": 30,
    },
}  # fmt: skip
_CLONE, _CLONE3, _CLONE_THREAD = {"x86_64": 56, "aarch64": 220}, 435, 0x10000
_PRLIMIT = {"x86_64": 302, "aarch64": 261}
# Signals that come from a file, to whatever process the caller names: F_SETOWN, F_SETSIG, F_SETOWN_EX; FIOSETOWN and
# SIOCSPGRP; and TIOCSTI, which types into a terminal.
_FCNTL, _FCNTL_DENIED = {"x86_64": 72, "aarch64": 25}, (8, 10, 15)
_IOCTL, _IOCTL_DENIED = {"x86_64": 16, "aarch64": 29}, (0x8901, 0x8902, 0x5412)


def _libc():
    return ctypes.CDLL(None, use_errno=True)


def _called(what, result):
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def landlock_version():
    """The version of Landlock that the kernel has; 0 for none."""
    return max(0, _libc().syscall(_NR_LANDLOCK[0], None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def limit_resources(limits):
    """Bound time, memory, the size of a file, open files and dumps of memory."""
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def drop_privileges():
    """Have no capabilities, get none from programs, and end with the process that waits."""
    libc = _libc()
    _called("no_new_privs", libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    if platform.machine() in _NR_CAPSET:
        header, nothing = struct.pack("=Ii", 0x20080522, 0), bytes(24)
        _called("capset", libc.syscall(_NR_CAPSET[platform.machine()], header, nothing))


def confine_files(folder, readable):
    """Landlock: files are readable below `readable` and in the folder, and writable in the folder.

    Raises:
        OSError: the kernel has no Landlock.
    """
    version, libc = landlock_version(), _libc()
    if not version:
        raise OSError("the kernel has no Landlock, or it is turned off")
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    # Of TCP, binding and connecting; of what crosses its borders, abstract sockets and signals.
    attributes = struct.pack("=QQQ", handled, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _called(
        "landlock", libc.syscall(_NR_LANDLOCK[0], attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    )
    read_file, write_file, read_folder, special = 1 << 2, 1 << 1, 1 << 3, (1 << 6) | (1 << 9) | (1 << 11)
    rights = [(path, read_file | read_folder) for path in readable]
    rights += [("/dev/null", read_file | write_file), ("/dev/urandom", read_file), ("/dev/zero", read_file)]
    rights += [(folder, handled & ~special & ~1)] if folder else []
    for path, allowed in rights:
        try:
            number = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # not on this machine
        if not os.path.isdir(path):
            allowed &= ~read_folder
        rule = struct.pack("=Qi", allowed & handled, number)
        _called("landlock", libc.syscall(_NR_LANDLOCK[1], ruleset, 1, rule, ctypes.c_uint32(0)))
        os.close(number)
    _called("landlock", libc.syscall(_NR_LANDLOCK[2], ruleset, ctypes.c_uint32(0)))
    os.close(ruleset)


def _filter():
    """Instructions of seccomp's machine: what is denied fails as if it were not allowed, all else goes on."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES or sys.byteorder != "little" or sys.maxsize < 2**32:
        raise OSError(f"no filter of system calls is written for {machine}")
    load, jump_equal, jump_above, jump_bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, allow, refuse, absent = 0x80000000, 0x7FFF0000, 0x50000 | _EPERM, 0x50000 | _ENOSYS
    steps = [(load, 0, 0, 4), (jump_equal, 1, 0, _ARCHITECTURES[machine]), (give, 0, 0, kill), (load, 0, 0, 0)]
    if machine == "x86_64":  # x32 has numbers of its own
        steps += [(jump_above, 0, 1, 0x40000000), (give, 0, 0, kill)]
    for number in sorted({**_DENIED, **_DENIED_OF[machine]}.values()):
        steps += [(jump_equal, 0, 1, number), (give, 0, 0, refuse)]
    # Threads are tasks of this process; any other clone is a process. The flags of clone3 cannot be read: glibc goes
    # on with clone where it is absent.
    steps += [(jump_equal, 0, 1, _CLONE3), (give, 0, 0, absent)]
    steps += [(jump_equal, 0, 4, _CLONE[machine]), (load, 0, 0, 16), (jump_bits, 1, 0, _CLONE_THREAD)]
    steps += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    # Limits may be read, and are not set: the pointer to new ones must be null.
    steps += [(jump_equal, 0, 6, _PRLIMIT[machine]), (load, 0, 0, 32), (jump_equal, 1, 0, 0), (give, 0, 0, refuse)]
    steps += [(load, 0, 0, 36), (jump_equal, 1, 0, 0), (give, 0, 0, refuse), (load, 0, 0, 0)]
    for number, denied in ((_FCNTL[machine], _FCNTL_DENIED), (_IOCTL[machine], _IOCTL_DENIED)):
        steps += [(jump_equal, 0, 2 + 2 * len(denied), number), (load, 0, 0, 24)]
        for value in denied:
            steps += [(jump_equal, 0, 1, value), (give, 0, 0, refuse)]
        steps += [(give, 0, 0, allow)]
    return b"".join(struct.pack("=HBBI", *step) for step in [*steps, (give, 0, 0, allow)])


def confine_calls():
    """seccomp: no sockets, no processes, no signals to others, nothing that changes files without opening them.

    Raises:
        OSError: the kernel has no seccomp, or the machine is of another kind.
    """
    content = ctypes.create_string_buffer(_filter())
    program = ctypes.create_string_buffer(struct.pack("@HP", (len(content) - 1) // 8, ctypes.addressof(content)))
    _called("seccomp", _libc().prctl(_PR_SET_SECCOMP, 2, ctypes.c_void_p(ctypes.addressof(program)), 0, 0))


def lock_in(setup):
    """Take what this process may not have away from it; `setup["needs"]` are locks without which it ends.

    Returns:
        The locks that did not close, with the reason.
    """
    open_locks = {}
    locks = {
        "limits": lambda: limit_resources(setup["limits"]),
        "privileges": drop_privileges,
        "files": lambda: confine_files(setup["folder"], setup["readable"]),
        "calls": confine_calls,
    }
    for name, lock in locks.items():
        try:
            lock()
        except (OSError, ValueError, AttributeError) as error:
            open_locks[name] = str(error)
            if name in setup["needs"]:
                os.write(2, f"{EXPLAIN}: {name}: {error}\n".encode())
                os._exit(LOCK_FAILED)
    return open_locks


# Values between candidate and tests: data alone, written so that JSON keeps what Python tells apart.


_SEQUENCES = {"l": list, "t": tuple, "s": set, "z": frozenset, "i": iter}  # type: dict[str, Any]


class Codec:
    """Writes values as JSON has them. Objects that are no data stay where they are, and are named by a number.

    Args:
        remote (callable): makes a stand-in of such a number; `None` where objects are kept.
    """

    def __init__(self, remote: Any = None) -> None:
        self.objects: list[Any] = []
        self._remote = remote

    def write(self, value, depth=0):
        kind = type(value)
        if value is None or kind in (bool, str, int):
            return value
        if depth > 200:
            raise ValueError("values are nested too deep")
        if kind is Stand:
            return {"r": object.__getattribute__(value, "_number")}
        if isinstance(value, bool | int):
            return int(value)
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, float):
            return {"f": float.__repr__(value)}
        if isinstance(value, complex):
            return {"c": [float.__repr__(value.real), float.__repr__(value.imag)]}
        if isinstance(value, bytes | bytearray):
            return {"y": bytes(value).hex()}
        if isinstance(value, dict):
            return {"d": [[self.write(k, depth + 1), self.write(v, depth + 1)] for k, v in dict.items(value)]}
        for base, tag in ((list, "l"), (tuple, "t"), (frozenset, "z"), (set, "s")):
            if isinstance(value, base):
                content = base.__iter__(value)  # type: ignore[arg-type]
                return {tag: [self.write(one, depth + 1) for one in content]}
        if kind is range or hasattr(kind, "__next__") or kind in (type({}.keys()), type({}.values()), type({}.items())):
            return {"i" if hasattr(kind, "__next__") else "l": [self.write(one, depth + 1) for one in value]}
        if kind.__module__ == "numpy" and hasattr(value, "tolist"):
            return self.write(value.tolist(), depth + 1)
        if self._remote is not None:
            raise TypeError(f"a {kind.__name__} of the tests cannot be handed to the answer")
        self.objects.append(value)
        return {"r": len(self.objects) - 1}

    def read(self, value):
        if not isinstance(value, dict):
            return value
        ((tag, content),) = value.items()
        if tag == "r":
            return self.objects[content] if self._remote is None else self._remote(content)
        if tag == "f":
            return float(content)
        if tag == "c":
            return complex(float(content[0]), float(content[1]))
        if tag == "y":
            return bytes.fromhex(content)
        if tag == "d":
            return {self.read(k): self.read(v) for k, v in content}
        parts = [self.read(one) for one in content]
        return _SEQUENCES[tag](parts)


class Pipe:
    """Lines of JSON to another process and from it."""

    def __init__(self, read_from, write_to):
        self._in, self._out = os.fdopen(read_from, "r", encoding="ascii"), os.fdopen(write_to, "w", encoding="ascii")

    def send(self, message):
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def receive(self):
        line = self._in.readline()
        if not line:
            raise EOFError("the answer's process has ended")
        return json.loads(line)


def run_program(source):
    sys.argv = ["answer.py"]
    exec(compile(source, "answer.py", "exec"), {"__name__": "__main__", "__builtins__": builtins})


def serve(source, pipe):
    """Run a candidate, and do what the tests ask."""
    space = {"__name__": "answer", "__builtins__": builtins}
    try:
        exec(compile(source, "answer.py", "exec"), space)
    except BaseException as error:
        pipe.send({"failed": f"{type(error).__name__}: {error}"[:500]})
        return
    codec = Codec()
    codec.objects.append(space)
    pipe.send({"names": {name: callable(value) for name, value in space.items() if not name.startswith("__")}})
    while True:
        asked = pipe.receive()
        try:
            target: Any = codec.objects[asked["of"]]
            found: Any = target[asked["name"]] if target is space else target
            if target is not space and asked["name"] is not None:
                if "value" in asked:
                    setattr(found, asked["name"], codec.read(asked["value"]))
                    pipe.send({"value": None, "changed": []})
                    continue
                found = getattr(found, asked["name"])
            if "args" not in asked:
                pipe.send({"calls": callable(found), "value": None if callable(found) else codec.write(found)})
                continue
            args = codec.read(asked["args"])
            value = found(*args, **codec.read(asked["named"]))
            pipe.send({"value": codec.write(value), "changed": [codec.write(one) for one in args]})
        except BaseException as error:
            pipe.send({"raised": type(error).__name__, "text": str(error)[:500]})


class Stand:
    """In tests, in the place of something that is in the candidate's process."""

    def __init__(self, caller, number, name=None):
        for key, value in (("_caller", caller), ("_number", number), ("_name", name)):
            object.__setattr__(self, key, value)

    def __call__(self, *args, **named):
        return object.__getattribute__(self, "_caller")._call(self, args, named)

    def __getattr__(self, name: str) -> Any:
        return object.__getattribute__(self, "_caller")._attribute(self, name)

    def __setattr__(self, name, value):
        object.__getattribute__(self, "_caller")._set(self, name, value)


class Caller:
    """Calls what is in the candidate's process."""

    def __init__(self, pipe):
        self._pipe = pipe
        self._codec = Codec(lambda number: Stand(self, int(number)))

    def _ask(self, stand, **more):
        number, name = (object.__getattribute__(stand, key) for key in ("_number", "_name"))
        self._pipe.send({"of": number, "name": name, **more})
        reply = self._pipe.receive()
        if "raised" in reply:
            kind: Any = getattr(builtins, str(reply["raised"]), None)
            fits = isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, AssertionError)
            raise (kind if fits else RuntimeError)(str(reply["text"]))
        return reply

    def _call(self, stand, args, named):
        reply = self._ask(stand, args=self._codec.write(list(args)), named=self._codec.write(named))
        for mine, theirs in zip(args, reply["changed"], strict=False):
            if type(mine) in (list, dict, set):
                self._take_over(mine, self._codec.read(theirs))
        return self._codec.read(reply["value"])

    def _take_over(self, mine, theirs):
        """What a function did to an argument in place."""
        if type(mine) is not type(theirs) or mine == theirs:
            return
        if type(mine) is list:
            mine[:] = theirs
        else:
            mine.clear()
            mine.update(theirs)

    def _attribute(self, stand, name):
        if name.startswith("__"):
            raise AttributeError(name)
        one = Stand(self, object.__getattribute__(stand, "_number"), name)
        reply = self._ask(one)
        return one if reply["calls"] else self._codec.read(reply["value"])

    def _set(self, stand, name, value):
        self._ask(Stand(self, object.__getattribute__(stand, "_number"), name), value=self._codec.write(value))

    def named(self, names, calls):
        """Stand-ins of the candidate's names, and values of those that are no functions."""
        return {name: Stand(self, 0, name) if calls[name] else self._value(name) for name in names}

    def _value(self, name):
        reply = self._ask(Stand(self, 0, name))
        return Stand(self, 0, name) if reply["calls"] else self._codec.read(reply["value"])


def _names_in(code):
    found = set(code.co_names)
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            found |= _names_in(constant)
    return found


def run_tests(tests, pipe, verdict):
    """Run tests one after another; the number of those that pass and why the first one did not go to `verdict`.

    A name of the candidate that a test reads is a stand-in, unless it is one of Python's own.
    """
    passed, reason = 0, ""
    first = pipe.receive()
    if "failed" in first:
        reason = str(first["failed"])
    else:
        caller = Caller(pipe)
        for test in tests:
            try:
                code = compile(test, "tests.py", "exec")
                wanted = [name for name in first["names"] if name in _names_in(code) and not hasattr(builtins, name)]
                space = {"__name__": "tests", "__builtins__": builtins, **caller.named(wanted, first["names"])}
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(code, space)
                passed += 1
            except BaseException as error:
                reason = reason or f"{type(error).__name__}: {error}"
    os.write(verdict, json.dumps({"passed": passed, "of": len(tests), "reason": reason[:500]}).encode())


def main():
    with os.fdopen(int(sys.argv[1])) as file:
        setup = json.load(file)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    sys.path += setup["path"]  # packages, without what their .pth files would run
    role = setup["role"]
    pipe: Any = Pipe(*setup["pipe"]) if setup["pipe"] else None
    open_locks = lock_in(setup)
    if role == "look":
        print(json.dumps({"open": open_locks, "landlock": landlock_version()}))
    elif role == "program":
        run_program(setup["source"])
    elif role == "candidate":
        serve(setup["source"], pipe)
    else:
        run_tests(setup["tests"], pipe, setup["verdict"])


if __name__ == "__main__":
    main()
