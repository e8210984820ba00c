"""Say in one line what the suites came to; a test that was left out, or passed only when it was
tried again, is never passed over in silence.

A report NAME-again.xml is of the tests that had failed in NAME.xml, each tried once more by itself.
"""

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree as ET

passed = 0
failed: set[str] = set()
mended: set[str] = set()
reasons: Counter[str] = Counter()
for name in sorted(sys.argv[1:], key=lambda each: "-again" in each):
    path = Path(name)
    again = path.stem.endswith("-again")
    for case in ET.parse(path).iter("testcase"):
        which = f"{path.stem.removesuffix('-again')}: {case.get('classname')}::{case.get('name')}"
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed.add(which)
            mended.discard(which)
        elif skip is not None:
            reasons[skip.get("message", "")] += not again
        elif again:
            mended.add(which)
        else:
            passed += 1
failed -= mended
print(
    f"scripts/test: {passed + len(mended)} passed, {len(failed)} failed,"
    f" {sum(reasons.values())} skipped"
)
for reason, count in sorted(reasons.items()):
    print(f"       skipped {count}: {reason}")
for which in sorted(mended):
    print(f"       passed only by itself, with nothing beside it: {which}")
for which in sorted(failed):
    print(f"       failed: {which}")
