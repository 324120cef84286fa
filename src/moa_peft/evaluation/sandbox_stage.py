"""The outer process of the sandbox: builds what a program may see, and starts the program in it.

A separate script, run by a bare interpreter (`python -I -S -B`) and never imported: whatever it changes about its
process ends with that process. It needs nothing but the standard library. Three processes come of it: this one; the
first one of a new process namespace, whose end ends everything in it; and the program's.

On the standard streams: the program's text comes in and its report goes out through files that the caller opened; a
line on standard error means that nothing was run.
"""

import ctypes
import json
import os
import resource
import sys

TYPE_CHECKING = (
    False  # to import it from typing, or pathlib or signal at all, would make each start a third slower
)
if TYPE_CHECKING:
    from typing import Any

_NAMESPACES = {"user": 0x10000000, "mount": 0x20000, "uts": 0x4000000, "ipc": 0x8000000, "pid": 0x20000000, "net": 0x40000000}  # fmt: skip
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_MNT_DETACH, _AT_FDCWD, _AT_RECURSIVE = 2, -100, 0x8000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _SIGKILL = 1, 38, 9
_SYS_MOUNT_SETATTR = 442  # the same on every architecture, as all calls since Linux 5.1
_FREE_USERS = 60600
"""From here on 500 user ids are unused on Linux by convention: above those of people, below those of services."""

_LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Read the order from the command line, run it, and leave with the program's exit code."""
    order = json.loads(sys.argv[1])
    try:
        enter_namespaces(order)
        first = os.fork()
        if first == 0:
            start_program(order)
        end_with_parent()  # after the change of user, which would clear it
        leave_as(first)
    except OSError as error:
        refuse(error)


def enter_namespaces(order: "dict[str, Any]") -> None:
    """Leave the machine's mounts, network, processes and names; an ordinary user also its users."""
    flags = sum(bits for name, bits in _NAMESPACES.items() if name != "user")
    user, group = os.getuid(), os.getgid()
    if user == 0:
        order["user"] = _FREE_USERS + os.getpid() % 500
        unshare(flags)
        return
    order["user"] = None
    unshare(flags | _NAMESPACES["user"])
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{user} {user} 1")
    write("/proc/self/gid_map", f"{group} {group} 1")


def start_program(order: "dict[str, Any]") -> None:
    """Be the first process of the namespace: lay out its files, run the program, end when it has ended."""
    try:
        end_with_parent()
        lay_out_files(order)
        program = os.fork()
        if program == 0:
            become_program(order)
        leave_as(program)
    except OSError as error:
        refuse(error)


def lay_out_files(order: "dict[str, Any]") -> None:
    """Make a root of the interpreter and the system's libraries, all read-only, and one empty folder to write in."""
    root, size = order["root"], order["disk_mib"]
    mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for path in order["visible"]:
        show(path, root + path)
    show("/dev/null", f"{root}/dev/null", device=True)
    work = f"{root}/work"
    os.mkdir(work)
    owner = "" if order["user"] is None else f",uid={order['user']},gid={order['user']}"
    mount("tmpfs", work, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={size}m,nr_inodes=4096,mode=700{owner}")
    os.chdir(root)
    call("pivot_root", _LIBC.pivot_root, b".", b".")
    call("umount", _LIBC.umount2, b".", _MNT_DETACH)
    os.chdir("/")
    restrict("/", _ATTR_RDONLY, recursive=False)


def show(path: str, place: str, *, device: bool = False) -> None:
    """Show a file or folder of the machine at a place of the new root, read-only; a link as the link that it is."""
    if not os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), place)
        return
    if os.path.isdir(path):
        os.makedirs(place, exist_ok=True)
    else:
        write(place, "")
    mount(path, place, None, _MS_BIND | _MS_REC)
    restrict(place, _ATTR_RDONLY | _ATTR_NOSUID | (0 if device else _ATTR_NODEV))


def become_program(order: "dict[str, Any]") -> None:
    """Give up every privilege, take on the limits, and turn into a bare interpreter that runs the program."""
    try:
        if order["user"] is not None:
            os.setgroups([])
            os.setresgid(order["user"], order["user"], order["user"])
            os.setresuid(order["user"], order["user"], order["user"])
        call("prctl", _LIBC.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        os.setsid()
        os.umask(0o077)
        os.chdir("/work")
        for name, (soft, hard) in order["limits"].items():
            resource.setrlimit(getattr(resource, name), (soft, hard))
        python = order["python"]
        # with a user that is not root this also drops the capabilities of a user namespace
        os.execve(python, [python, "-s", "-P", "-S", "-B", "-c", order["runner"]], order["environment"])
    except OSError as error:
        refuse(error)


def leave_as(child: int) -> None:
    """Wait for a child and leave with its exit code, 128 and the signal's number where one ended it."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def end_with_parent() -> None:
    """Be killed when the process that started this one ends."""
    call("prctl", _LIBC.prctl, _PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)


def unshare(flags: int) -> None:
    """Enter new namespaces."""
    call("unshare", _LIBC.unshare, flags)


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Mount something, or change a mount."""
    words = [None if one is None else one.encode() for one in (source, target, kind, data)]
    call(f"mount {target}", _LIBC.mount, *words[:3], ctypes.c_ulong(flags), words[3])


def restrict(place: str, attributes: int, *, recursive: bool = True) -> None:
    """Add restrictions to a mount, and to those below it; what it is restricted in already stays."""
    change = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(change))
    flags = _AT_RECURSIVE if recursive else 0
    number = ctypes.c_long(_SYS_MOUNT_SETATTR)
    call("mount_setattr", _LIBC.syscall, number, _AT_FDCWD, place.encode(), flags, ctypes.byref(change), size)


def write(path: str, text: str) -> None:
    """Write a file."""
    with open(path, "w") as file:
        file.write(text)


def call(name: str, function: "Any", *arguments: "Any") -> None:
    """Call a function of the C library.

    Raises:
        OSError: If it fails; with the name of what failed.
    """
    if function(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def refuse(error: OSError) -> None:
    """Say why nothing is run, and leave."""
    os.write(2, f"{error.strerror or error}\n".encode())
    os._exit(1)


if __name__ == "__main__":
    main()
