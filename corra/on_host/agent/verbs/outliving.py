"""Outliving the login session: whether logind ends it, and the scope that spares the guards."""

import posix as os

from ..contract import START_DEADLINE_S, Refusal
from ..paths import present, slurp
from ..spool import user_name
from .starter import answer_of

SCOPED = {"memory_max": ("memory", "MemoryMax=%d"), "cpu_quota": ("cpu", "CPUQuota=%d%%")}


def outliving(request):
    """Return the words before the guards' command with which they outlive this login session.

    There are none where nothing ends the guards. Where logind's KillUserProcesses is on, the end of
    a session ends all its processes, daemons too. A scope of the user's own manager is spared while
    the user lingers; for root the system's manager makes one. A scope also holds the limits of a
    whole tree. Raises Refusal where nothing would help.
    """
    words = [
        "systemd-run",
        "--scope",
        "--quiet",
        "--collect",
        "--description=corra " + request["prog_id"],
        "-p",
        "Delegate=yes",
    ]
    user = user_name()
    # The doctor asks without a program.
    limits = (request.get("program") or {}).get("limits") or {}
    scoped = [name for name in sorted(SCOPED) if limits.get(name) is not None]
    for name in scoped:
        words += ["-p", SCOPED[name][1] % limits[name]]
    if not scoped and not ends_with_session(request):
        return []
    there = present("/run/user/%d/systemd" % os.geteuid()) and present(
        "/var/lib/systemd/linger/" + user
    )
    if scoped:
        check_scope(scoped, user, there)
    elif os.geteuid() and not there:
        raise Refusal(
            "no_linger",
            "logind here kills programs at logout, and linger is off for %s" % user,
            user=user,
        )
    return words + ["--user"] * bool(os.geteuid())


def check_scope(scoped, user, there):
    """Raise Refusal where no scope would hold the limits `scoped`; systemd reports no failure."""
    what, at = " and ".join(scoped), "/sys/fs/cgroup/"
    if not present("/run/systemd/system"):
        raise Refusal(
            "no_scope", "%s: only systemd can set that, and it isn't what runs this machine" % what
        )
    if os.geteuid():
        if not there:
            raise Refusal(
                "no_scope",
                "%s: only a systemd of %s's own can set that, and linger is off" % (what, user),
                user=user,
            )
        at += "user.slice/user-%d.slice/user@%d.service/" % (os.geteuid(), os.geteuid())
    try:
        given = slurp(at + "cgroup.controllers").decode().split()
    except FileNotFoundError:
        given = []  # cgroup v1
    lacking = [SCOPED[name][0] for name in scoped if SCOPED[name][0] not in given]
    if lacking:
        raise Refusal(
            "no_scope",
            "%s: the systemd of %s has no cgroup v2 controller: %s"
            % (what, user, " ".join(lacking)),
        )


def ends_with_session(request):
    """Return whether logind ends this session's processes with it, unless `force` is asked for."""
    scopes = [
        part
        for part in slurp("/proc/self/cgroup").decode("ascii", "replace").split("/")
        if part.startswith("session-")
    ]
    owners = [
        part
        for part in slurp("/proc/self/cgroup").decode("ascii", "replace").split("/")
        if part.startswith("user-")
    ]
    if not scopes or not owners or (request.get("run") or {}).get("force"):
        return False
    return logind_kills(user_name(int(owners[0].partition("-")[2].partition(".")[0])))


def logind_kills(user):
    """Return whether logind ends the processes of this user's sessions, by its own answer."""
    manager = [
        "org.freedesktop.login1",
        "/org/freedesktop/login1",
        "org.freedesktop.login1.Manager",
    ]
    asked = (
        ["busctl", "get-property"]
        + manager
        + ["KillUserProcesses", "KillOnlyUsers", "KillExcludeUsers"]
    )
    # Without a logind the answer is empty.
    said = answer_of(asked, "", START_DEADLINE_S).decode("utf-8", "replace")
    kills, only, excluded = (said.splitlines() + ["b false"] * 3)[:3]
    named = '"%s"' % user
    return (
        kills == "b true"
        and named not in excluded.split()
        and (only == "as 0" or named in only.split())
    )
