"""JUnit XML: what CI servers read of tests, here of expectations.

Source: the schema of Jenkins' xunit plugin, junit-10.xsd.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple
from xml.etree import ElementTree as Xml

_NO_CHARACTER = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, however it is written (section 2.2)."""


class Case(NamedTuple):
    """One expectation."""

    name: str
    state: Literal["passed", "failure", "error", "skipped"]
    text: str
    """What was found."""


class Suite(NamedTuple):
    """The expectations of one scenario."""

    name: str
    file: str
    cases: Sequence[Case]


def document(suites: Sequence[Suite]) -> str:
    """Return the suites as JUnit XML. Whatever a name holds, the text is well-formed."""
    root = Xml.Element(
        "testsuites", {"name": "overcommit", **_counts([case for each in suites for case in each.cases])}
    )
    for suite in suites:
        parent = Xml.SubElement(root, "testsuite", {"name": _clean(suite.name), **_counts(suite.cases)})
        for case in suite.cases:
            attributes = {"name": _clean(case.name), "classname": _clean(suite.name), "file": _clean(suite.file)}
            element = Xml.SubElement(parent, "testcase", attributes)
            if case.state == "passed":
                Xml.SubElement(element, "system-out").text = _clean(case.text)
            else:
                Xml.SubElement(element, case.state, {"message": _clean(case.text)})
    Xml.indent(root)
    text = Xml.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _counts(cases: Sequence[Case]) -> dict[str, str]:
    states = Counter(case.state for case in cases)
    told = {"tests": states.total(), "failures": states["failure"], "errors": states["error"]}
    return {name: str(count) for name, count in told.items()}


def _clean(text: str) -> str:
    """The text with what XML cannot hold made visible."""
    return _NO_CHARACTER.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
