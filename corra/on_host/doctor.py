"""What a host tells beyond States: whether it has what a run needs; a run's request, its processes.

The client sends it together with agent.py for one answer (corra/remote/agent_client.py, `visit`).
It stays in memory, so it works where nothing can be written, and it changes nothing. Standard
library only, Python 3.6 and later.

    examine {spool, digest}   the facts that the checks of `doctor` judge
    record  {prog_id, spool}  {"record": program.json, "stdin": BYTES}, then those bytes
    tree    {prog_id, spool}  {"processes": [...]}: what each has used, and uses a second now

A refusal is {"error": KIND, "message": TEXT}, as the agent's.
"""

import errno
import os
import resource
import stat
import sys
import time

import agent

TREE_S = 0.3


def main(verb, request, nonce, out):
    """Answer one verb; return the exit code."""
    reply = agent.Reply(out, nonce)
    try:
        value, more = VERBS[verb](request)
    except agent.Refusal as refusal:
        value, more = refusal.reply, b""
    except OSError as error:
        value, more = (
            {
                "error": "failed",
                "message": "%s: %s" % (error.filename or "", error.strerror or error),
            },
            b"",
        )
    # The time comes last, so that it is as near to its arrival as can be.
    reply.send(dict(value, time=time.time()))
    reply.write(more)
    return 1 if "error" in value else 0


# ============================================================ a run


def record(request):
    """Return the request of a run, and the bytes of its stdin."""
    run = agent.find(request)
    given = (
        agent.read_file(run.directory, "stdin")
        if run.request["program"].get("stdin") is not None
        else None
    )
    return {"record": run.request, "stdin": len(given or b"")}, given or b""


def tree(request):
    """Return the living processes of a run: the program and all that descend from it."""
    run = agent.find(request)
    before = {pid: used(pid) for pid in agent.late("family")(run)}
    began = time.monotonic()
    time.sleep(TREE_S)
    family = agent.late("family")(run)
    took = time.monotonic() - began
    found = []
    for pid, (state, parent, start, name) in sorted(family.items()):
        cpu_s = used(pid)
        if cpu_s is None:
            continue
        found.append(
            {
                "pid": pid,
                "parent": parent,
                "name": name,
                "state": state,
                "argv": [
                    os.fsdecode(word) for word in looked("/proc/%d/cmdline" % pid).split(b"\0")[:-1]
                ],
                "cpu_s": cpu_s,
                "cpus": max(0.0, cpu_s - (before.get(pid) or 0.0)) / took if pid in before else 0.0,
                "memory": memory(pid),
                "wchan": agent.late("wchan")(pid) if state == "D" else None,
                "start": start,
            }
        )
    return {"processes": found, "spool": room(run.directory)}, b""


def used(pid):
    """Return the seconds of CPU that a process has used, or None when it has gone."""
    text = looked("/proc/%d/stat" % pid).decode("ascii", "replace").rpartition(")")[2].split()
    return (int(text[11]) + int(text[12])) / os.sysconf("SC_CLK_TCK") if text else None


def memory(pid):
    """Return a process's share of memory in bytes (PSS), or its RSS if only its owner may know."""
    for line in looked("/proc/%d/smaps_rollup" % pid).splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    pages = looked("/proc/%d/statm" % pid).split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


def looked(path):
    try:
        return agent.slurp(path)
    except OSError:
        return b""


# ============================================================ the host


def examine(request):
    """Return the facts about this host and user; corra/remote/checkup.py judges them."""
    return {
        "python": "%d.%d.%d" % sys.version_info[:3],
        "executable": sys.executable,
        "kernel": " ".join(os.uname()[0:3:2]),
        "user": agent.user_name(),
        "uid": os.geteuid(),
        "home": agent.home(),
        "cache": [cache(path, request.get("digest")) for path in caches()],
        "spool": [spool(path) for path in agent.roots(request)],
        "logout": logout(request),
        "processes": processes(),
        "file_size": limit(resource.RLIMIT_FSIZE),
        "files": limit(resource.RLIMIT_NOFILE),
    }, b""


def caches():
    """Return the directories where the loader may put the agent."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = os.environ.get("HOME", "") or agent.home() or "/nonexistent"
    return [
        os.path.join(base if os.path.isabs(base) else os.path.join(home, ".cache"), "corra"),
        "/var/tmp/corra-%d/cache" % os.geteuid(),
    ]


def cache(path, digest):
    """Return whether the agent is there, and what would keep the loader from putting it there."""
    source = os.path.join(path, str(digest), "agent.py")
    above = existing(path)
    problem = unsafe(path if os.path.lexists(path) else above) or unwritable(above)
    return dict(
        room(above), dir=path, problem=problem, agent=not problem and os.path.isfile(source)
    )


def spool(root):
    """Return the facts of a spool's root, and what would keep a run from being spooled there."""
    above = existing(root)
    problem = unwritable(above)
    try:
        remote = agent.REMOTE_TYPES.get(agent.file_system(above))
    except OSError as error:
        remote, problem = None, error.strerror
    if remote:
        problem = "is on a remote file system (%s)" % remote
    for each in (root, os.path.join(root, "runs")):
        if not problem and os.path.lexists(each):
            try:
                os.close(agent.secure(each))
                os.listdir(each)
            except OSError as error:
                problem = "%s: %s" % (each, error.strerror)
    free = room(above)
    return dict(free, dir=root, problem=problem or (None if free["size"] else "is on no disk"))


def existing(path):
    """Return `path`, or the nearest directory above it that exists."""
    while not os.path.isdir(path) and path != "/":
        path = os.path.dirname(path)
    return path


def unwritable(path):
    if os.access(path, os.W_OK | os.X_OK):
        return None
    return os.strerror(errno.EROFS if os.statvfs(path).f_flag & os.ST_RDONLY else errno.EACCES)


def unsafe(path):
    """Return why the loader wouldn't trust a file there, or None."""
    path = os.path.realpath(path)
    while True:
        found = os.stat(path)
        if found.st_uid not in (0, os.geteuid()):
            return "%s belongs to somebody else" % path
        if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
            return "others may write to %s" % path
        if path == "/":
            return None
        path = os.path.dirname(path)


def room(path):
    """Return how much is free on the disk of `path`, and how much corra leaves to others."""
    disk = os.statvfs(path)
    size = disk.f_blocks * disk.f_frsize
    return {
        "free": disk.f_bavail * disk.f_frsize,
        "size": size,
        "floor": min(agent.FLOOR, size // agent.FLOOR_SHARE),
        "inodes": disk.f_favail if disk.f_files else None,
    }


def logout(request):
    """Return whether a run ends when its login session ends, and whether it gets a scope."""
    try:
        return {"scope": bool(agent.outliving(dict(request, prog_id="doctor"))), "ends": False}
    except agent.Refusal as refusal:
        return {"ends": True, "user": refusal.reply.get("user")}


def processes():
    """Return how many processes there are and may be: of this user, and of each control group."""
    found = []
    own = os.geteuid()
    most = limit(resource.RLIMIT_NPROC)
    if own and most is not None:
        count = 0
        for entry in os.listdir("/proc"):
            try:
                count += entry.isdigit() and os.stat("/proc/" + entry).st_uid == own
            except OSError:
                pass
        found.append({"of": "ulimit -u", "now": count, "most": most})
    lines = looked("/proc/self/cgroup").decode("utf-8", "surrogateescape").splitlines()
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    while path != "/":
        most = looked("/sys/fs/cgroup%s/pids.max" % path).strip()
        if most.isdigit():
            found.append(
                {
                    "of": "cgroup " + path,
                    "now": int(looked("/sys/fs/cgroup%s/pids.current" % path) or 0),
                    "most": int(most),
                }
            )
        path = os.path.dirname(path)
    return found


def limit(which):
    soft = resource.getrlimit(which)[0]
    return None if soft == resource.RLIM_INFINITY else soft


VERBS = {"examine": examine, "record": record, "tree": tree}
