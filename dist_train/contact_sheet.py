"""The page of an audit: write_contact_sheet() shows what is wrong with a folder of images, picture by picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data.audit import Audit, File
from dist_train.data.decode import read_image
from dist_train.labels import Suspect
from dist_train.page import embed_picture, write_page

SHOWN = 24


def write_contact_sheet(file: Path, folder: Path, audit: Audit, suspects: Sequence[Suspect] | None) -> None:
    """Write the page; each section shows its first SHOWN groups. suspects: None if no run was asked."""
    sections = [
        (
            "Copies across splits",
            "Train and validation share these: accuracy on them says little.",
            audit.across_splits(),
        ),
        ("Contrary labels", "The very same image under several classes.", audit.conflicting()),
        ("Look-alikes", "Nearly the same image twice, by perceptual hash.", [list(pair) for pair in audit.near or []]),
        ("Blank", "Images that show nothing.", [[file] for file in audit.blank()]),
    ]
    write_page(
        file,
        "contact_sheet.html",
        folder=folder.resolve().name,
        counts=audit.counts(),
        classes=audit.per_class(),
        sections=[
            {"title": title, "says": says, "count": len(groups), "groups": [_show(folder, g) for g in groups[:SHOWN]]}
            for title, says, groups in sections
        ],
        unreadable=[(str(bad.path.relative_to(folder)), bad.fault) for bad in audit.unreadable()[:SHOWN]],
        suspects=None if suspects is None else [_show_suspect(folder, suspect) for suspect in suspects[:SHOWN]],
        suspected=len(suspects or []),
    )


def _show(folder: Path, group: list[File]) -> list[dict[str, Any]]:
    return [
        {"picture": _picture(file.path), "label": file.label, "name": str(file.path.relative_to(folder))}
        for file in group
    ]


def _show_suspect(folder: Path, suspect: Suspect) -> dict[str, Any]:
    return {"picture": _picture(folder / suspect.name), **suspect._asdict()}


def _picture(path: Path) -> str:
    return embed_picture(np.asarray(read_image(path)))
