"""The command line: parses, calls, reports; no logic.

Exit codes: 0 done; 1 failure; 2 bad input, told in one line on stderr; 75 stopped by a signal after saving,
resumable.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from dist_train.config import InputError
from dist_train.faults import Interrupted, TrainingError
from dist_train.launch import RESUMABLE
from dist_train.options import Command, add_config_arguments, add_train_arguments, make_config, parse, run_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    main_process = os.environ.get("LOCAL_RANK", "0") == "0"
    _set_up_logging(main_process)
    try:
        name, options = parse(arguments, COMMANDS)
        return COMMANDS[name].run(options)
    except InputError as error:
        if main_process:  # every process of a machine finds the same fault
            print(f"dist-train: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        if main_process:
            print(f"dist-train: {error}", file=sys.stderr)
        return RESUMABLE
    except TrainingError as error:
        print(f"dist-train: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


# train


def _train(options: Namespace) -> int:
    from dist_train.run import run_training

    run_training(make_config(options), overwrite=bool(options.get("overwrite")))
    return 0


# lr-find


def _add_lr_find_arguments(parser: ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--steps", type=int, default=100, help="Optimizer steps from the lowest rate to the highest.")
    parser.add_argument("--out", type=str, default="lr_find", help="Folder for lr_find.csv and lr_find.png.")


def _lr_find(options: Namespace) -> int:
    from dist_train.lr_find import find_rate

    config, out = make_config(options), Path(options.out)
    rate = find_rate(config, out, options.steps)
    if os.environ.get("RANK", "0") == "0":
        print(f"suggested optim.lr: {rate:.2g} (in the config: {config.optim.lr:g}); curve: {out / 'lr_find.png'}")
    return 0


# evaluate


def _add_evaluate_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="Run folder.")
    parser.add_argument("--data.path", type=str, help="Where the run's data lies now, if not where it lay in training.")
    parser.add_argument(
        "--split", choices=("validation", "test"), default="validation", help="Which images to judge; report.json says."
    )
    parser.add_argument("--tta", action="store_true", help="Average over ten shifted and mirrored views of each image.")
    parser.add_argument(
        "--calibrate", action="store_true", help="Store the fitted temperature with the model, which then applies it."
    )


def _evaluate(options: Namespace) -> int:
    from dist_train.report import evaluate_run

    run_dir = Path(options.run)
    judging = {name: options[name] for name in ("split", "tta", "calibrate")}
    evaluate_run(run_dir, run_config(run_dir, options.data.path), **judging)
    return 0


# audit


def _add_audit_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("dir", type=str, help="Folder with train/<class>/* and, if there is one, validation/<class>/*.")
    parser.add_argument("--json", type=str, help="Write the counts to this file.")
    parser.add_argument("--html", type=str, help="Write a page with the images found to this file.")
    parser.add_argument("--run", type=str, help="Run folder whose model points out likely label errors in validation.")


def _audit(options: Namespace) -> int:
    from dist_train.contact_sheet import write_contact_sheet
    from dist_train.data.audit import audit_folder
    from dist_train.labels import find_label_errors

    folder, suspects = Path(options.dir), None
    audit = audit_folder(folder)
    print(audit.table())
    if options.run:
        run_dir = Path(options.run)
        config = run_config(run_dir, str(folder), "folder")
        suspects = find_label_errors(run_dir, config)
        print(f"likely label errors among the validation images that are not in train: {len(suspects):,}")
    try:
        if options.json:
            Path(options.json).write_text(json.dumps(audit.counts(), indent=2) + "\n")
        if options.html:
            write_contact_sheet(Path(options.html), folder, audit, suspects)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be written: {error.strerror}") from error
    return 0


# launch


def _add_launch_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--processes", help="Processes on this machine; auto: one per GPU, one on a CPU.", default="auto"
    )
    parser.add_argument("--nodes", type=int, help="Machines, where neither SLURM nor Kubernetes says how many.")
    parser.add_argument("--precision", choices=["auto", "no", "fp16", "bf16"], help="Short for --train.precision.")
    parser.add_argument("--log_dir", help="Folder for the output of each process, besides the common one.")
    parser.add_argument("--dry-run", action="store_true", help="Print the command and start nothing.")
    parser.add_argument("arguments", nargs="*", help="A command and its options, or the options of train.")


def _launch(options: Namespace) -> int:
    from dist_train.launch import choose_command, choose_processes, find_place, run

    arguments = options.arguments or []
    if not arguments or arguments[0].startswith("-"):
        arguments = ["train", *arguments]
    if options.precision:
        arguments += ["--train.precision", options.precision]
    if arguments[0] == "launch":
        raise InputError("launch: cannot launch itself; name another command, or the options of train")
    parse(arguments, COMMANDS)  # so that a fault is told once, before anything is started
    if options.processes != "auto" and not (options.processes.isdecimal() and int(options.processes)):
        raise InputError(f"--processes: {options.processes!r} is not allowed; expected auto or a whole number >= 1")
    place = find_place(os.environ, options.nodes)
    asked = None if options.processes == "auto" else int(options.processes)
    command = choose_command(arguments, *choose_processes(os.environ, asked), place, options.log_dir)
    print(shlex.join(command), flush=True)
    return 0 if options.dry_run else run(command)


# doctor


def _add_doctor_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--run_dir", default="runs", help="The run folder to be: is it shared, is there space?")
    parser.add_argument("--wait", type=float, default=60.0, help="Seconds in which all processes must have come.")


def _doctor(options: Namespace) -> int:
    from dist_train.doctor import examine

    findings, bad = examine(Path(options.run_dir), options.wait)
    for check, verdict, found, remedy in findings:
        print(f"{verdict:<5} {check:<15} {found}" + (f"\n      {'remedy:':>15} {remedy}" if remedy else ""), flush=True)
    return int(bad)


# predict


def _add_predict_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="Run folder.")
    parser.add_argument("inputs", nargs="+", help="Images, videos, folders, globs; - reads a list from standard input.")
    parser.add_argument("--faces", action="store_true", help="Find the faces and judge each, not the whole picture.")
    parser.add_argument("--out", type=Path, help=".csv, .jsonl or .parquet file; without it CSV on standard output.")
    parser.add_argument("--pictures", type=Path, help="Folder for annotated pictures.")
    parser.add_argument("--smoothing", type=float, default=0.6, help="Videos: share of the past in an answer, 0 to 1.")
    parser.add_argument("--every", type=int, default=1, help="Videos: judge every n-th frame.")
    parser.add_argument("--strict", action="store_true", help="Exit with 2 if a file could not be read.")


def _predict(options: Namespace) -> int:
    from dist_train.predict import predict

    settings = {name: options[name] for name in ("out", "faces", "pictures", "smoothing", "every")}
    return 2 if predict(options.run, options.inputs, **settings) and options.strict else 0


# export


def _add_export_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="Run folder.")
    parser.add_argument("--format", choices=("onnx", "safetensors", "hub"), required=True, help="What to write.")
    parser.add_argument("--out", type=str, required=True, help="New folder to write to.")
    parser.add_argument("--quantize", choices=("static", "dynamic"), help="onnx: add an int8 copy and what it costs.")
    parser.add_argument("--data.path", type=str, help="Where the run's data lies now, if not where it lay in training.")
    parser.add_argument("--push", type=str, metavar="USER/NAME", help="hub: upload the folder to this repository.")


def _export(options: Namespace) -> int:
    from dist_train.export import export

    run_dir = Path(options.run)
    config = run_config(run_dir, options.data.path) if options.quantize else None
    export(run_dir, options.out, options.format, quantize=options.quantize, config=config, push=options.push)
    return 0


# demo


def _add_demo_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="Run folder.")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="Address to serve at; 0.0.0.0: to everybody.")
    parser.add_argument("--port", type=int, default=7860, help="Port to serve at.")


def _demo(options: Namespace) -> int:
    from dist_train.demo import serve

    serve(options.run, options.host, options.port)
    return 0


COMMANDS = {
    "train": Command(
        "Train a model and leave a run folder. Without --config and --data.path: the quickstart on the built-in faces.",
        add_train_arguments,
        _train,
        takes_config=True,
    ),
    "lr-find": Command(
        "Suggest optim.lr: a short training whose learning rate rises until it diverges. Takes what train takes.",
        _add_lr_find_arguments,
        _lr_find,
        takes_config=True,
    ),
    "evaluate": Command(
        "Judge a run's validation images: figures, report.json and report.html in the run folder.",
        _add_evaluate_arguments,
        _evaluate,
    ),
    "audit": Command(
        "Look for unreadable, blank, repeated, leaked and contrarily labelled images in a folder.",
        _add_audit_arguments,
        _audit,
    ),
    "launch": Command(
        "Start a command, train if none is named, on every GPU of this machine; once per machine for several.",
        _add_launch_arguments,
        _launch,
    ),
    "doctor": Command(
        "Check what usually goes wrong before a long job; under a launcher, on all processes together.",
        _add_doctor_arguments,
        _doctor,
    ),
    "predict": Command(
        "Judge photographs and videos with a trained run; writes a table of labels and probabilities.",
        _add_predict_arguments,
        _predict,
    ),
    "export": Command(
        "Write a run's best model for use elsewhere: ONNX, safetensors or a Hugging Face Hub folder.",
        _add_export_arguments,
        _export,
    ),
    "demo": Command("Open a page in the browser that judges photographs with a run.", _add_demo_arguments, _demo),
}


def _set_up_logging(main_process: bool) -> None:
    """Let the main process of each machine speak, the others only of errors."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.getLogger().addHandler(logging.NullHandler())  # else a library's logging.info() makes all be said twice
    logger = logging.getLogger("dist_train")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if main_process else logging.ERROR)
