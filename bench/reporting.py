"""What the reports of all measurements end with: what they were made with, and where they go."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any


def software(*packages: str) -> dict[str, Any]:
    """Return the versions of `packages` and the commit."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return {"versions": {name: version(name) for name in packages}, "commit": commit}


def write_report(report: dict[str, Any], file: Path | None) -> None:
    """Print the ratios as a table and the report as JSON, which is also written where a file is named."""
    for name, ratio in report.get("ratios", {}).items():
        print(f"{name:40} {ratio:8.3f}")
    text = json.dumps(report, indent=2)
    print(text)
    if file:
        file.write_text(text + "\n")
