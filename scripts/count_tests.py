#!/usr/bin/env python3
"""Counts the test cases in the test.xml files below a folder and prints `N passed, N failed, N skipped` as the last line.

Usage: count_tests.py FOLDER STATUS. STATUS is what the runs returned: a failure that no case explains (a build error, a
test that could not start) counts as one failed case. Exits with 1 if anything failed or nothing ran.
"""
import pathlib
import sys
import xml.etree.ElementTree as ElementTree


def main() -> int:
    folder, status = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    passed = failed = skipped = 0
    for path in sorted(folder.rglob("test.xml")):
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            if case.get("name", "").startswith("DISABLED_"):
                continue  # a part of other cases, which run it in a process of its own
            name = f"{path.parent.relative_to(folder)}: {case.get('classname', '')}.{case.get('name')}"
            if case.find("failure") is not None or case.find("error") is not None:
                failed += 1
                print(f"failed: {name}")
            elif case.find("skipped") is not None or case.get("status") == "notrun" or case.get("result") == "skipped":
                skipped += 1
                print(f"skipped: {name}")
            else:
                passed += 1
    if status != 0 and failed == 0:
        failed = 1
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 0 if failed == 0 and passed > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
