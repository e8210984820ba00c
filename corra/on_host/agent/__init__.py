"""The agent, in parts: scripts/join makes corra/agent.py of them, the one file that travels.

Rules for a part; scripts/join refuses what breaks one of them:
- It opens with a docstring. The made file has it as the part's banner; the first part's is the agent's own.
- Imports come next, and nowhere else a part is imported from: `from .x import name`, never `as`.
- It imports from earlier parts only, in the order of PARTS in scripts/join. So there is no circle.
- A name at the top level is unique over all parts.
- From the standard library it imports modules (`import x`, or `import x as y`), and few: a guard holds each
  of them in memory for weeks. `os` is posix: os.py and what that imports are 2 ms of each start, and 150 to
  440 kB of each run's memory.
"""
