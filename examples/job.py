"""A data job of many hours, and a message when it is over.

    inv -r examples -c job crunch --host big1 --data s3://bucket/day=7 --notify ops@example.org
    inv -r examples -c job crunch ...

The second call, from any machine, attaches to the running job, or prints its result. The job's id
follows from its input, so that two people can't start it twice. The host sends the message at the
end of the job, so the message also comes when nobody watches.
"""

import hashlib

from invoke import task

import corra

# $0 sends the message, $1 is the input, $2 the program. The exit code is the program's, even if the
# message fails.
JOB = '"$2" "$1"; code=$?; printf "%s ended with %s\\n" "$1" "$code" | sh -c "$0"; exit $code'


@task(
    help={
        "host": "where it runs",
        "data": "what it works on",
        "program": "what works on it",
        "notify": "a command that reads the message (mail -s job ops@example.org)",
        "wait": "stay until it is over",
    }
)
def crunch(c, host="", data="", program="wc", notify="cat > /dev/null", wait=False):
    """Start a job, or take hold of it: inv crunch --host big1 --data FILE"""
    if not (host and data):
        raise corra.Stop("say --host and --data; inv --help crunch has an example")
    prog_id = "crunch-" + hashlib.sha256(f"{program} {data}".encode()).hexdigest()[:16]
    run = corra.start(
        host,
        ["sh", "-c", JOB, notify, data, program],
        id=prog_id,
        name="crunch",
        cwd="/",
        timeout="24h",
        keep="30d",
    )
    if not wait:
        print(run.id)
        return
    result = run.wait()
    print(result.stdout, end="")
    if result.failed:
        raise corra.Stop(
            f"{data}: the job ended with {result.exited} after {result.elapsed:.0f} s",
            code=result.exited,
        )
