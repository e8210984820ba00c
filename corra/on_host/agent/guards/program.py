"""The forked child before it becomes the program: environment, ends, limits, exec."""

import _signal
import errno
import fcntl
import posix as os

from ..contract import PAGE, PATH
from ..kernel import F_SETPIPE_SZ, mono_ns, now_ns
from ..paths import join, octets, slurp, text_of
from ..processes import boot_id, is_waiting, process
from ..records import pack
from ..spool import stream_names, takes_more
from .limits import set_limit


def own_environment():
    """Return the environment that this process was started with.

    posix.environ may have an LC_CTYPE that Python has added to the C locale.
    """
    pairs = (each.partition(b"=") for each in slurp("/proc/self/environ", 8 << 20).split(b"\0"))
    return {name: value for name, _, value in pairs if name}


def environment(request, inherited):
    """Return the program's environment as bytes: inherited, set by the request, and its PROG-ID.

    corra's own variables are removed. A carrier gets the request's as CORRA_FAR_NAME, and no
    secrets.
    """
    program = request["program"]
    keep = True if program.get("env_inherit") is None else program["env_inherit"]
    wanted = None if keep is True else {octets(name) for name in keep or ()}
    made = {key: value for key, value in inherited.items() if wanted is None or key in wanted}
    made = {key: value for key, value in made.items() if not key.startswith(b"CORRA_")}
    prefix = b"CORRA_FAR_" if (request.get("run") or {}).get("carrier") else b""
    secrets = () if prefix else request.get("secret_env", {}).items()
    for name, value in list((program.get("env") or {}).items()) + list(secrets):
        if value is not None:
            made[prefix + octets(name)] = octets(value)
        elif not prefix:
            made.pop(octets(name), None)
    if program.get("pty"):
        made.setdefault(
            b"TERM",
            octets(((request.get("run") or {}).get("terminal") or {}).get("term") or "dumb"),
        )
    made[b"CORRA_PROG_ID"] = octets(request["prog_id"])
    return made


def secrets_pipe(secrets):
    """Return the read end of a pipe that holds `secrets` in the form of an environment.

    /proc shows nobody what is in a pipe. Raises OSError: E2BIG where they are more than a pipe
    takes.
    """
    data = b"".join(b"%s=%s\0" % (octets(name), octets(value)) for name, value in secrets.items())
    ours, theirs = os.pipe()
    try:
        fcntl.fcntl(theirs, F_SETPIPE_SZ, max(len(data), PAGE))
    except OSError:
        pass  # this user has no pages for pipes left: the pipe keeps its size
    os.set_blocking(theirs, False)
    if os.write(theirs, data) < len(data):
        raise OSError(errno.E2BIG, "%d bytes are more than a pipe takes" % len(data))
    os.close(theirs)
    os.set_inheritable(ours, True)
    return ours


def explain(number, path, argv, variables):
    """Return what exec's errno means for this file, or "" where strerror says enough."""
    if number == errno.E2BIG:
        longest = max(map(len, argv))
        return (
            "the longest word has %d bytes, all words and the environment %d; one may have 131071"
            % (
                longest,
                sum(map(len, argv)) + sum(len(k) + len(v) + 2 for k, v in variables.items()),
            )
        )
    try:
        head = slurp(path, 256)
    except OSError:
        head = b""
    if number == errno.ENOENT and head.startswith(b"#!"):
        line = head[2:].split(b"\n")[0]
        if line.endswith(b"\r"):
            return "its first line ends in CR LF: convert it with  sed -i 's/\\r$//' FILE"
        return "its interpreter doesn't exist: " + text_of(line.split()[0] if line.split() else b"")
    if number == errno.ENOENT and head:
        return "the file is there, but its loader (ELF interpreter) isn't"
    if number == errno.ENOEXEC:
        return "no #! line and no program of this machine's kind: run it as  sh FILE"
    if number == errno.EACCES and os.stat(path).st_mode & 0o170000 == 0o040000:
        return "is a directory"
    return ""


def candidates(argv, variables):
    """Return the files that exec tries, in the order of PATH."""
    name = octets(argv[0])
    if b"/" in name:
        return [name]
    return [join(each or b".", name) for each in variables.get(b"PATH", PATH).split(b":")]


def note_failure(slot, stage, error, message, path=None):
    """Write to the slot's second page why the program was not started.

    Bytes in a pipe would be lost with the guard that reads them.
    """
    number = getattr(error, "errno", 0) or 0
    text = message or (os.strerror(number) if number else str(error))
    lines = [
        ("stage", stage),
        ("type", errno.errorcode.get(number, type(error).__name__)),
        ("errno", number),
        ("message", text),
    ]
    os.pwrite(slot, pack(lines + ([("path", path)] if path is not None else [])), PAGE)
    os.fsync(slot)


def prefer_for_oom():
    """Have the kernel kill the program, and not a guard, when memory runs out."""
    try:
        score = int(slurp("/proc/self/oom_score_adj"))
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
        os.write(fd, b"%d" % min(1000, score + 100))
        os.close(fd)
    except (OSError, ValueError):
        pass  # some containers forbid it; then program and guards are equal


def become_program(directory, files, request, inherited, guards, report, save, tell):
    """Prepare the forked child, claim `launched` and exec. Never returns.

    Nothing is started where one of the `guards` got a SIGTERM before.

    The child also writes the keeper's first record (`save`) and state.json (`tell`): the memory
    that takes ends with the exec here, while the keeper would hold it for weeks.

    A carrier (`run.carrier`) takes the program to another machine. It is executed with argv behind
    its own words. It closes $CORRA_REPORT once the program runs there, or writes "STAGE ERRNO
    WORDS" into it. Signal 33 + N asks it to send the program signal N. It exits as the program
    did. Where a signal ends a carrier, the run is lost, or not started if the carrier has reported
    that. It finds the program's variables as CORRA_FAR_NAME and the secret ones in a pipe,
    $CORRA_SECRETS; the program's cwd is left to it.
    """
    program, carrier = request["program"], (request.get("run") or {}).get("carrier")
    words = list(carrier or ()) + list(program["argv"])
    stage, where, argv = "setup", b"", [octets(word) for word in words]
    try:
        os.setsid()
        save()
        for number in range(1, _signal.NSIG):
            try:
                _signal.signal(number, _signal.SIG_DFL)
            except (OSError, ValueError):
                pass
        prefer_for_oom()
        if program.get("pty"):
            # The first terminal that a session's leader opens becomes the session's own.
            ends = [os.open(request["terminal"], os.O_RDWR)] * 3
        else:
            outputs = [
                os.open("fifo/" + name, os.O_WRONLY, dir_fd=directory)
                for name in stream_names(request)
            ]
            if program.get("stdin") is None:
                source = os.open("/dev/null", os.O_RDONLY)
            else:
                source = os.open(
                    "fifo/stdin" if takes_more(request) else "stdin", os.O_RDONLY, dir_fd=directory
                )
            ends = [source, outputs[0], outputs[-1]]
        for target, fd in enumerate(ends):
            os.dup2(fd, target)
        if program.get("umask") is not None:
            os.umask(program["umask"])
        else:
            os.umask(request["umask"])
        variables = environment(request, inherited)
        if carrier:
            os.set_inheritable(report, True)
            variables[b"CORRA_REPORT"] = b"%d" % report
            if request.get("secret_env"):
                where = b"its secrets"
                variables[b"CORRA_SECRETS"] = b"%d" % secrets_pipe(request["secret_env"])
        stage = "cwd"
        at = variables.get(b"HOME", b"/")
        if program.get("cwd") and not carrier:
            where = octets(program["cwd"])
            # `~` is the program's home, where a relative path begins as well.
            where = join(at, where[1:].lstrip(b"/") if where[:2] in (b"~", b"~/") else where)
            os.chdir(where)
        else:
            try:
                os.chdir(at)
            except OSError:
                os.chdir("/")
        stage, where = "setup", b""
        if any(is_waiting(each, _signal.SIGTERM) for each in guards):
            raise InterruptedError(errno.EINTR, "SIGTERM came to its guards before it was started")
        pid = os.getpid()
        text = "%d %d %s %d %d" % (pid, process(pid)[2], boot_id(), now_ns(), mono_ns())
        os.pwrite(files["launched"], text.encode().ljust(255), 0)
        os.fsync(files["launched"])
        # Limits come last, since they hold for this code too; memory after the other limits.
        for name, value in sorted(
            (program.get("limits") or {}).items(), key=lambda each: each[0] == "memory"
        ):
            if value is not None:
                set_limit(name, value)
        try:
            os.link("launched.tmp", "launched", src_dir_fd=directory, dst_dir_fd=directory)
        except FileExistsError:
            os._exit(127)  # launched before, by a guard that has the status
        # After a crash from here on the host must know that exec was tried: a repeated start would
        # run the program again.
        os.fsync(directory)
        tell()
        stage, worst, where = "exec", None, argv[0]
        # The mask goes last: a TERM since the fork must end the program and not this code.
        _signal.pthread_sigmask(_signal.SIG_SETMASK, [])
        for path in candidates(words, variables):
            try:
                os.execve(path, argv, variables)
            except OSError as error:
                # As execvp: a file that isn't there doesn't hide one that may not be run.
                if worst is None or error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    worst, where = error, path
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                    break
        message, path = explain(worst.errno, where, argv, variables), None
        if b"/" not in argv[0] and worst.errno == errno.ENOENT and not message:
            path = text_of(variables.get(b"PATH", PATH))
        note_failure(files["exit"], stage, worst, message, path)
    except Exception as error:
        try:
            words = getattr(error, "strerror", None) or ""
            note_failure(
                files["exit"], stage, error, "%s: %s" % (text_of(where), words) if where else words
            )
        except OSError:
            pass
    finally:
        os._exit(127)
