"""A database's backup, and the drill that proves that the backup can be restored.

    inv -r examples -c database drill --host db1 --ticket DRILL-7

The dump, the restore into a scratch database and the comparison are separate steps: a drill that
dies in its third hour goes on in its third hour. The commands stand for pg_dump, pg_restore and
psql on plain files, so that you can try the example on any machine.
"""

from invoke import task

import corra

DUMP = (
    'mkdir -p "$0/backup" && tar -C "$0/data" -cf "$0/backup/new.tar" . '
    '&& mv "$0/backup/new.tar" "$0/backup/last.tar"'
)
RESTORE = (
    'rm -rf "$0/scratch" && mkdir "$0/scratch" && tar -C "$0/scratch" -xf "$0/backup/last.tar"'
)
COUNT = 'cat "$0/$1"/* | wc -l'


@task(
    help={
        "host": "the database's host",
        "ticket": "names this drill: the same one continues it",
        "root": "its directory there",
    }
)
def drill(c, host="", ticket="", root="/srv/corra-example"):
    """Back up, restore beside it, compare: inv drill --host db1 --ticket DRILL-7"""
    if not (host and ticket):
        raise corra.Stop("say --host and --ticket; inv --help drill has an example")
    with corra.runbook("drill", key=ticket, params={"host": host, "root": root}) as book:
        book.run(host, ["sh", "-c", DUMP, root], step="dump", timeout="4h")
        size = int(
            book.run(host, ["stat", "-c", "%s", f"{root}/backup/last.tar"], step="size").stdout
        )
        if size < 1024:
            raise corra.Stop(f"the backup has only {size} bytes")
        book.run(host, ["sh", "-c", RESTORE, root], step="restore", timeout="8h")
        rows = {
            part: int(book.run(host, ["sh", "-c", COUNT, root, part], step=f"count-{part}").stdout)
            for part in ("data", "scratch")
        }
        if rows["data"] != rows["scratch"]:
            raise corra.Stop(
                f"restored {rows['scratch']} rows of {rows['data']}: the backup is NOT good"
            )
        book.run(host, ["rm", "-rf", f"{root}/scratch"], step="clean-up")
        book.note(f"restored all {rows['data']} rows from {size} bytes")
