"""Smoother: follows faces from frame to frame of a video and averages their probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dist_train.faces import Box
from dist_train.inference import Face

SAME_FACE = 0.3  # least overlap (intersection over union) of a face with itself in the next frame
PATIENCE = 10  # frames for which a face may be out of sight


@dataclass
class _Track:
    """A face that was seen before: where, its smoothed probabilities, and for how many frames it has been missing."""

    face: Face
    missing: int = 0


class Smoother:
    """Averages each face's probabilities over the frames of one video.

    keep: share of the average that the past has, 0 (no smoothing) up to 1. A face is known again by the overlap of
    its box; a whole picture is always the same face.
    """

    def __init__(self, keep: float) -> None:
        self.keep = keep
        self.tracks: list[_Track] = []

    def __call__(self, faces: Sequence[Face]) -> list[Face]:
        """Return the faces of the next frame with averaged probabilities."""
        pairs = [(overlap(t.face.box, f.box), i, j) for i, t in enumerate(self.tracks) for j, f in enumerate(faces)]
        known: dict[int, int] = {}  # face -> track, the best overlaps first
        for shared, i, j in sorted(pairs, reverse=True):
            if shared >= SAME_FACE and j not in known and i not in known.values():
                known[j] = i
        seen = []
        for j, face in enumerate(faces):
            if j in known:
                past = self.tracks[known[j]].face.probabilities
                face = replace(face, probabilities=self.keep * past + (1 - self.keep) * face.probabilities)
            seen.append(_Track(face))
        lost = [_Track(t.face, t.missing + 1) for i, t in enumerate(self.tracks) if i not in known.values()]
        self.tracks = seen + [track for track in lost if track.missing <= PATIENCE]
        return [track.face for track in seen]


def overlap(a: Box | None, b: Box | None) -> float:
    """Return the intersection over union of two boxes, 0..1; the whole picture (None) overlaps only itself."""
    if a is None or b is None:
        return float(a is b)
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)
