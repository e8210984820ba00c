"""The agent, in parts: scripts/join makes corra/agent.py of them, the one file that travels.

Rules for a part; scripts/join refuses a part that breaks one of them:
- It opens with a docstring, which becomes its banner. The first part's is the agent's own.
- Imports come next. From another part it imports names, by `from .x import name`, never `as`.
- It imports from earlier parts only, in the order of PARTS in scripts/join. So there is no circle.
- A part among LATE in scripts/join is loaded by `late("NAME")`, since no part before imports from
  it. It has no three single quotes, which would end the text that it stands in.
- A name at the top level is unique over all parts, and one with an underscore stays in its part.
- It is Python 3.6. From the standard library it imports modules, by `import x` or `import x as y`,
  and few: a guard holds each of them in memory for weeks. `os` is posix, since os.py costs each
  start 2 ms and each run 150 to 440 kB.
"""
