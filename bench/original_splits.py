"""Write the original FER2013 splits of the face-expression-recognition dataset as a file for data.splits.

    python bench/original_splits.py DIR > splits.csv

DIR: train/<class>/<n>.jpg and validation/<class>/<n>.jpg, a random reshuffle of all images. n is the row of Kaggle's
fer2013.csv: below 28,709 Training (here train), up to 32,297 PublicTest (validation), the others PrivateTest (test).
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from dist_train.data.folders import list_folders

TRAINING, PUBLIC_TEST = 28_709, 32_298


def main() -> None:
    path = Path(sys.argv[1])
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["path", "split"])
    for file in sorted((file for files in list_folders(path).values() for file in files), key=lambda f: int(f.stem)):
        row = int(file.stem)
        split = "train" if row < TRAINING else "validation" if row < PUBLIC_TEST else "test"
        table.writerow([file.relative_to(path), split])


if __name__ == "__main__":
    main()
