"""Say in one line what the suites came to; a test that was left out is never left out in silence."""

import sys
from pathlib import Path
from xml.etree import ElementTree as ET

total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
reasons: dict[str, int] = {}
for path in sys.argv[1:]:
    for suite in ET.parse(Path(path)).iter("testsuite"):
        for key in total:
            total[key] += int(suite.get(key, "0"))
        for skip in suite.iter("skipped"):
            reason = skip.get("message", "")
            reasons[reason] = reasons.get(reason, 0) + 1
bad = total["failures"] + total["errors"]
print(f"scripts/test: {total['tests'] - bad - total['skipped']} passed, {bad} failed, {total['skipped']} skipped")
for reason, count in sorted(reasons.items()):
    print(f"       skipped {count}: {reason}")
