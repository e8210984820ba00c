# Sent by bootstrap.py in the loader's place for a verb that leaves nothing behind on the host.
# The modules come packed on stdin; the last of them has the verb. Runs on Python 3.6 and later.
import json
import os
import sys
import types
import zlib

nonce, verb, size, *modules = stdin.readline().decode().split()
request = json.loads(stdin.read(int(size)).decode())
for each in modules:
    name, size = each.split(":")
    module = sys.modules[name] = types.ModuleType(name)
    source = zlib.decompress(stdin.read(int(size))).decode()
    module.__dict__["AGENT_SOURCE"] = (
        source  # there is no file where the agent could find its late parts
    )
    exec(compile(source, name + ".py", "exec"), module.__dict__)
code = module.main(verb, request, nonce, sys.stdout.buffer)
sys.stdout.flush()
os._exit(code)
