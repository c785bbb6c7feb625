"""Fine-tune a facial-expression classifier on one CPU, one GPU or many machines with accelerate."""

from dist_train.config import CLASSES
from dist_train.evaluation import evaluate
from dist_train.figures import plot_history
from dist_train.model import FaceModel, load_run
from dist_train.pictures import view_results
from dist_train.training import train

__all__ = ["CLASSES", "FaceModel", "evaluate", "load_run", "plot_history", "train", "view_results"]
