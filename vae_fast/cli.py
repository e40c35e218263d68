"""The command line: ``vae-fast train | evaluate | sample | encode | reconstruct | denoise | manifold |
reproduce | bench | doctor``.

Exit codes: 0 for success; 1 where something went wrong on the way; 2 for data or a command that cannot be
used, said in one sentence on stderr, with nothing written; 130 after Ctrl-C, with the state saved and the
command that goes on from it.

torch is imported by the commands, not by this module, so that ``--help`` does not wait for it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import logging
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

from . import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from .datasets import Prepared
    from .trainer import Trainer

SAMPLES = 1_000_000
REPORTS = 25  # points of the curves of a run
MOST_HELD_OUT = 10_000
CHECKPOINT, HISTORY, REPORT, RUN = "checkpoint.safetensors", "history.csv", "report.html", "run.json"

_LR = {"adagrad": 0.02, "sgd": 0.001, "adam": 0.001, "adamw": 0.001}


class _Positive(click.FloatRange):
    """A finite number above 0."""

    def __init__(self) -> None:
        super().__init__(0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


class _Group(click.Group):
    """Says in one sentence on stderr what went wrong, and exits with the code that belongs to it."""

    def main(self, *args: Any, **options: Any) -> Any:
        options["standalone_mode"] = False
        try:
            with _plain_warnings():
                code = super().main(*args, **options)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(2)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            _fail("interrupted", 130)
        except ImportError as error:
            _fail(str(error), 1)
        except Exception as error:
            from .checkpoint import CheckpointError
            from .datasets import DataError
            from .trainer import TrainingError

            if isinstance(error, (DataError, CheckpointError)):
                _fail(str(error), 2)
            if isinstance(error, (TrainingError, OSError)):
                _fail(str(error), 1)
            raise
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"vae-fast: {' '.join(message.split())}", err=True)
    sys.exit(code)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as sentences, without the line of source that raised them."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: click.echo(f"vae-fast: warning: {message}", err=True)
        yield


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
)
@click.version_option(__version__, message="vae-fast %(version)s")
def main() -> None:
    """Train variational auto-encoders, fast.

    \b
    vae-fast train                      the paper's model on MNIST, then report.html
    vae-fast train my_images.npy        the same on your own data
    vae-fast doctor                     is everything in order on this machine?
    """


# ---- train -------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What ``--resume`` needs and the checkpoint does not hold: ``run.json`` in the folder of a run."""

    data: str  # "mnist", or an absolute path
    test: str | None
    samples: int
    report_every: int
    image_shape: str
    model: dict[str, Any]
    training: dict[str, Any]
    kind: str  # how pixels are taken: real, binary or dynamic
    command: list[str] = field(default_factory=list)  # without --samples and --out

    def save(self, out: Path) -> None:
        from .report import write_atomically

        write_atomically(out / RUN, (json.dumps({"format": 1, **asdict(self)}, indent=1) + "\n").encode())

    @classmethod
    def load(cls, out: Path) -> Run:
        try:
            content = json.loads((out / RUN).read_text(encoding="utf-8"))
            if content.pop("format") != 1:
                raise ValueError("another format")
            return cls(**content)
        except OSError as error:
            raise click.UsageError(f"{out}: found no readable {RUN}; wanted the folder of a run") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise click.UsageError(f"{out / RUN}: found damaged contents; wanted those of a run") from error


def _widths(ctx: click.Context, parameter: click.Parameter, text: str) -> list[int]:
    """500, or 200,100: one positive integer per layer."""
    widths = text.split(",")
    if not all(width.strip().isdecimal() and int(width) > 0 for width in widths):
        raise click.BadParameter(f"found {text!r}; wanted positive integers such as 500 or 200,100")
    return [int(width) for width in widths]


def _shape_text(ctx: click.Context, parameter: click.Parameter, text: str) -> str:
    """28x20, 32x32x3, "none" or "guess"."""
    sizes = text.split("x")
    positive = all(size.isdecimal() and int(size) > 0 for size in sizes)
    if text not in ("guess", "none") and not (len(sizes) in (2, 3) and positive):
        raise click.BadParameter(f"found {text!r}; wanted HEIGHTxWIDTH, HEIGHTxWIDTHx3 or none")
    return text


_SHAPE = click.option(
    "--image-shape",
    metavar="HxW",
    callback=_shape_text,
    default="guess",
    help="Of pictures: such as 28x20, or none where the data are no images. Guessed: squares and 28x20.",
)
_SEED = click.option("--seed", type=int, default=0, help="Of all random numbers.")
_ENGINE = click.option(
    "--engine",
    type=click.Choice(["auto", "native", "modules", "reference"]),
    default="auto",
    help="The curve does not depend on it.",
)


@main.command(short_help="Train a model; without arguments the paper's, on MNIST.")
@click.argument("data", required=False)
@click.option(
    "--test", metavar="PATH", help="Test data. Default: 10 % of DATA is held out, at most 10,000 rows."
)
@click.option("--out", metavar="DIR", help="Folder of the run. Default: vae-fast-run, or vae-fast-run-2, ...")
@click.option(
    "--resume", metavar="DIR", help="Go on with the run in this folder, to its --samples or those given."
)
@click.option("--samples", type=click.IntRange(1), default=SAMPLES, help="Training samples in all.")
@click.option(
    "--hidden",
    metavar="WIDTHS",
    callback=_widths,
    default="500",
    help="Widths of the encoder's hidden layers.",
)
@click.option("--latent", type=click.IntRange(1), default=20, help="Number of latent variables.")
@click.option(
    "--likelihood",
    type=click.Choice(["bernoulli", "gaussian"]),
    default="bernoulli",
    help="Gaussian for real numbers outside [0, 1].",
)
@click.option("--optimizer", type=click.Choice(list(_LR)), default="adagrad", help="How the parameters move.")
@click.option(
    "--lr",
    type=_Positive(),
    help="Step size. Default: 0.02 for Adagrad, 0.001 for the others.",
)
@click.option("--batch-size", type=click.IntRange(1), default=100, help="Datapoints in a minibatch.")
@click.option(
    "--targets",
    type=click.Choice(["auto", "real", "binary", "dynamic"]),
    default="auto",
    help="How pixels are taken; dynamic draws 0 or 1 anew at each use.",
)
@click.option(
    "--pixel-scale",
    type=_Positive(),
    default=255,
    help="Whole numbers are divided by it; 256 in the paper's code.",
)
@_SEED
@_ENGINE
@click.option(
    "--device", default="auto", help="cpu, cuda or cuda:1. auto: a GPU where this build can use one."
)
@_SHAPE
def train(
    data: str | None,
    test: str | None,
    out: str | None,
    resume: str | None,
    samples: int,
    engine: str,
    device: str,
    **options: Any,
) -> None:
    """Train a VAE; without arguments the paper's (500 hidden units, 20 latents) on MNIST.

    DATA is an .npy, .npz, .csv or idx file (this also as .gz) of one row or image per datapoint;
    FILE.npz:NAME takes one array of several. Left out: the bundled MNIST. The folder of the run then holds
    report.html, checkpoint.safetensors, history.csv and run.json. Ctrl-C saves, and --resume goes on as if
    nothing had happened.

    \b
    Example: vae-fast train faces.npz --likelihood gaussian --hidden 200 --latent 2
             vae-fast train --resume vae-fast-run --samples 2000000
    """
    ctx = click.get_current_context()
    if resume is not None:
        _resume(ctx, Path(resume), samples, engine, device)
        return
    run = _new_run(ctx, data or "mnist", test, samples, options)
    train_data, test_data, notes = _training_data(run)
    run.kind = train_data.kind
    _image_shape(run.image_shape, train_data.width)
    # So that a look at the test data is never the larger part of the work.
    look = 0 if test_data is None else len(test_data) // 2
    run.report_every = min(samples, max(1, samples // REPORTS, look))
    # Pixels of a Gaussian decoder stay in (0, 1), as in the paper's model of Frey Face.
    pixels = run.model["likelihood"] == "gaussian" and train_data.scale != 1
    run.model.update(data_dim=train_data.width, mean_activation="sigmoid" if pixels else None)
    trainer = _new_trainer(run, engine, device)
    folder = _new_folder(out)
    run.save(folder)
    _fit(run, folder, trainer, train_data, test_data, notes)


def _new_run(ctx: click.Context, data: str, test: str | None, samples: int, options: dict[str, Any]) -> Run:
    hidden = options["hidden"]
    model = {
        "hidden_dims": hidden,
        "latent_dim": options["latent"],
        "likelihood": options["likelihood"],
        # Weights of standard deviation 0.01 let hardly anything through several layers.
        "init": "paper" if len(hidden) == 1 else "torch",
        "seed": options["seed"],
    }
    training = {name: options[name] for name in ("optimizer", "batch_size", "seed", "targets", "pixel_scale")}
    training["lr"] = options["lr"] or _LR[options["optimizer"]]
    return Run(
        data=_absolute(data),
        test=None if test is None else _absolute(test),
        samples=samples,
        report_every=0,  # as the data say
        image_shape=options["image_shape"],
        model=model,
        training=training,
        kind="",  # as the data say
        command=_given(ctx, without=("out", "samples", "resume")),
    )


def _resume(ctx: click.Context, folder: Path, samples: int, engine: str, device: str) -> None:
    from .report import write_atomically

    allowed = ("resume", "samples", "engine", "device")
    if others := _given(ctx, without=allowed):
        raise click.UsageError(
            f"--resume: found {others[0]} with it; wanted no other options than --samples, --engine, --device"
        )
    run = Run.load(folder)
    if ctx.get_parameter_source("samples") is ParameterSource.COMMANDLINE:
        run.samples = samples
    train_data, test_data, notes = _training_data(run)
    checkpoint = folder / CHECKPOINT
    # A run that was killed before its first checkpoint begins again.
    trainer = (
        _load_trainer(checkpoint, engine, device)
        if checkpoint.exists()
        else _new_trainer(run, engine, device)
    )
    if trainer.samples_seen > run.samples:
        raise click.UsageError(
            f"--samples: found {run.samples:,}; wanted more than this run has seen, {trainer.samples_seen:,}"
        )
    before = (folder / RUN).read_bytes()
    run.save(folder)
    try:
        _fit(run, folder, trainer, train_data, test_data, notes)
    except click.UsageError:  # these are other data: nothing has been trained
        write_atomically(folder / RUN, before)
        raise


def _training_data(run: Run) -> tuple[Prepared, Prepared | None, list[str]]:
    """Training data, test data, and what there is to say about them; raises before anything is written."""
    from . import datasets

    notes: list[str] = []
    held_out: Tensor | None
    if run.data == "mnist":
        rows, held_out = datasets.mnist()
    else:
        rows, held_out = _rows(run.data), None
    name, test_name = _shown(run.data), "test"
    if run.test is not None:
        held_out, test_name = _rows(run.test), _shown(run.test)
    elif run.data != "mnist" and len(rows) > 1:
        total, count = len(rows), min(MOST_HELD_OUT, max(1, len(rows) // 10))
        datasets.prepare(rows, name=name, **_reading(run))  # so that a refusal counts rows as the file does
        rows, held_out = datasets.split(rows, count, seed=0)
        notes.append(
            f"No test data were given: {count:,} of the {total:,} rows, drawn at random, are held out."
        )
    train_data = datasets.prepare(rows, name=name, **_reading(run))
    if held_out is None:
        return train_data, None, ["No test data: there is one datapoint only."]
    test_data = datasets.prepare(
        held_out, name=test_name, width=train_data.width, **{**_reading(run), "targets": train_data.kind}
    )
    return train_data, test_data, notes


def _reading(run: Run) -> dict[str, Any]:
    return {
        "likelihood": run.model["likelihood"],
        "targets": run.training["targets"],
        "pixel_scale": run.training["pixel_scale"],
    }


def _new_trainer(run: Run, engine: str, device: str) -> Trainer:
    from .nn import VAE
    from .trainer import Trainer

    where = _device(device)
    _check_native(engine, where)
    return Trainer(VAE(**run.model), engine=engine, device=where, **run.training)


def _check_native(engine: str, device: str) -> None:
    from . import _C

    if engine == "native" and device.startswith("cuda") and not hasattr(_C, "CudaStep"):
        raise click.UsageError(
            f"--engine: found native with --device {device}, but this build has no CUDA kernels; "
            "wanted auto, or see vae-fast doctor"
        )


def _load_trainer(checkpoint: Path, engine: str = "auto", device: str = "cpu") -> Trainer:
    from .checkpoint import CheckpointError
    from .trainer import Trainer

    try:
        return Trainer.load(checkpoint, engine=engine, device=_device(device))
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError) as error:  # of a model or an optimizer that is the user's own
        raise click.UsageError(f"{checkpoint}: {error}") from error


def _device(name: str) -> str:
    import torch

    from ._extension import build_info

    cuda = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if cuda and build_info()["cuda"] else "cpu"
    try:
        kind = torch.device(name)
    except RuntimeError as error:
        raise click.UsageError(f"--device: found {name!r}; wanted cpu, cuda, cuda:N or auto") from error
    if kind.type not in ("cpu", "cuda"):
        raise click.UsageError(f"--device: found {name!r}; wanted cpu, cuda, cuda:N or auto")
    if kind.type == "cuda" and not (cuda and (kind.index or 0) < torch.cuda.device_count()):
        raise click.UsageError(
            f"--device: found {name}, which torch does not see here; wanted cpu, or see vae-fast doctor"
        )
    return name


def _new_folder(out: str | None) -> Path:
    """The folder of a new run, made; a run that is there is never overwritten."""
    if out is not None:
        folder = Path(out)
        for name in (RUN, CHECKPOINT, HISTORY, REPORT):
            if (folder / name).exists():
                raise click.UsageError(
                    f"--out: found a run in {out} ({name}); wanted another folder, "
                    f"or --resume {shlex.quote(out)}"
                )
        with _writing(out):
            folder.mkdir(parents=True, exist_ok=True)
        return folder
    number = 1
    while True:
        folder = Path("vae-fast-run" if number == 1 else f"vae-fast-run-{number}")
        with _writing(str(folder)), contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        number += 1


def _fit(
    run: Run,
    folder: Path,
    trainer: Trainer,
    train_data: Prepared,
    test_data: Prepared | None,
    notes: Sequence[str],
) -> None:
    from . import datasets
    from .checkpoint import CheckpointError
    from .report import write_report

    checkpoint = folder / CHECKPOINT
    again = f"vae-fast train --resume {shlex.quote(str(folder))}"
    for note in notes:
        click.echo(note, err=True)
    left = run.samples - trainer.samples_seen
    warm_up = 100 * trainer.settings.batch_size
    if trainer.settings.optimizer == "adagrad" and run.samples <= 2 * warm_up:
        click.echo(f"Adagrad changes nothing in its first {warm_up:,} samples: few are left", err=True)
    done = f"{trainer.samples_seen:,} of " if trainer.samples_seen else ""
    click.echo(f"{folder}: {done}{run.samples:,} samples on {trainer.device}", err=True)
    if left > 0:
        try:
            with _lines(trainer), warnings.catch_warnings():
                warnings.filterwarnings("error", message="train: these are not the data")
                warnings.filterwarnings("ignore", message="optimizer: Adagrad")  # which was said above
                trainer.fit(
                    train_data,
                    test_data,
                    max_samples=left,
                    report_every=run.report_every,
                    checkpoint=checkpoint,
                )
        except KeyboardInterrupt as interrupt:
            said = str(interrupt) or "stopped at once; the last checkpoint is whole"
            _fail(f"{said}. To go on: {again}", 130)
        except CheckpointError as error:
            _fail(f"{error}. To go on: {again}", 1)
        except UserWarning as warning:
            raise click.UsageError(
                f"{run.data}: found other data than this run was trained on; wanted the same"
            ) from warning
    history = trainer.history
    history.to_csv(folder / f".{HISTORY}.tmp")
    os.replace(folder / f".{HISTORY}.tmp", folder / HISTORY)
    write_report(
        folder / REPORT,
        trainer,
        train_data,
        test_data,
        name=_shown(run.data) + ("" if run.test is None else f", tested on {_shown(run.test)}"),
        image_shape=_image_shape(run.image_shape, train_data.width),
        reproduce=_reproduce(run),
        resume=f"{again} --samples {2 * run.samples}",
        notes=notes,
        labels=datasets.mnist_labels()[1] if run.data == "mnist" and run.test is None else None,
    )
    last = history.last
    which, bound = (
        ("test", last.test_bound) if last.test_bound is not None else ("training", last.train_bound)
    )
    rate = last.samples / max(last.seconds, 1e-9)
    click.echo(
        f"{which} bound {bound:.2f} nats per datapoint after {last.samples:,} samples "
        f"({last.seconds:.1f} s, {rate:,.0f} samples/s); report: {folder / REPORT}"
    )


@contextlib.contextmanager
def _lines(trainer: Trainer) -> Iterator[None]:
    """A line per report where there is no terminal for a progress bar, such as in a log file."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            seen = f"{trainer.samples_seen:>12,} samples  " if message.startswith("bound") else ""
            click.echo(seen + message, err=True)

    log, handler = logging.getLogger("vae_fast"), Lines()
    if sys.stderr.isatty():
        yield
        return
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _reproduce(run: Run) -> str:
    samples = [] if run.samples == SAMPLES else ["--samples", str(run.samples)]
    return shlex.join(["vae-fast", "train", *run.command, *samples])


def _given(ctx: click.Context, *, without: Sequence[str]) -> list[str]:
    """The arguments of this command as they were typed, in a fixed order."""
    words: list[str] = []
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if name in without or ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = ctx.params[name]
        if isinstance(parameter, click.Option) and parameter.is_flag:
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [text] if isinstance(parameter, click.Argument) else [parameter.opts[0], text]
    return words


# ---- evaluate, sample --------------------------------------------------------------------------------------

_CHECKPOINT = click.argument("checkpoint")


@main.command(short_help="Print the variational bound of a trained model.")
@_CHECKPOINT
@click.argument("data", required=False)
@click.option(
    "-n", "--num-samples", type=click.IntRange(1), default=1, help="Posterior samples per datapoint."
)
@_SEED
def evaluate(checkpoint: str, data: str | None, num_samples: int, seed: int) -> None:
    """Print the variational bound of a trained model.

    CHECKPOINT is the folder of a run or a checkpoint file. DATA is a file as for train, or mnist:train,
    mnist:test.
    Left out: the test data of the run.

    \b
    Example: vae-fast evaluate vae-fast-run --num-samples 10
    """
    from . import evaluation

    path = _checkpoint(checkpoint)
    trainer = _load_trainer(path)
    prepared, name = _data_of(trainer, path, data)
    result = evaluation.bound(trainer.model, prepared, num_samples=num_samples, seed=seed)
    units = evaluation.active_units(trainer.model, prepared, seed=seed)
    draws = "1 posterior sample" if num_samples == 1 else f"{num_samples} posterior samples"
    click.echo(f"bound          {result.elbo:10.3f}  nats per datapoint, {draws} each")
    click.echo(f"log p(x|z)     {result.log_likelihood:10.3f}")
    click.echo(f"KL             {result.kl:10.3f}")
    click.echo(f"active latents {units.count:6d} of {len(units.variance)}")
    click.echo(f"data           {name}: {result.count:,} datapoints, {prepared.kind} pixels")


@main.command(short_help="Draw samples from a trained model.")
@_CHECKPOINT
@click.option("-n", "--number", type=click.IntRange(1), default=100, help="How many samples.")
@click.option("-o", "--out", default="samples.png", help="A .png picture, or .npy for float32 [N, D].")
@_SEED
@_SHAPE
def sample(checkpoint: str, number: int, out: str, seed: int, image_shape: str) -> None:
    """Draw from the prior and decode: pixel means E[x | z] for z from N(0, I).

    CHECKPOINT is the folder of a run or a checkpoint file.

    \b
    Example: vae-fast sample vae-fast-run -n 64 -o digits.png
    """
    from . import plots
    from .report import write_atomically

    target = _output(out, (".png", ".npy"))
    path = _checkpoint(checkpoint)
    trainer = _load_trainer(path)
    model = trainer.model
    payload = io.BytesIO()
    if target.suffix == ".npy":
        import numpy as np

        np.save(payload, model.sample(number, seed=seed).float().numpy())
    else:
        shape = _picture_shape(path, image_shape, model.data_dim or 0)
        if shape is None:
            raise click.UsageError(
                f"--image-shape: found none for data of {model.data_dim} features; "
                "wanted HEIGHTxWIDTH, or -o samples.npy"
            )
        images = model.sample(number, seed=seed)
        low, high = min(0.0, float(images.min())), max(1.0, float(images.max()))
        payload.write(plots.png(plots.tile(images, shape, value_range=(low, high))))
    with _writing(out):
        write_atomically(target, payload.getvalue())
    click.echo(f"{number:,} samples: {out}")


# ---- encode, reconstruct, denoise, manifold ----------------------------------------------------------------


def _files(*names: str) -> Callable[[Any], Any]:
    array = Path(names[0]).suffix
    return click.option(
        "-o",
        "--out",
        multiple=True,
        default=names,
        help=f"An {array} file or a .png picture; may be repeated.",
    )


@main.command(short_help="Write the latent means of data.")
@_CHECKPOINT
@click.argument("data", required=False)
@_files("latents.npz", "latents.png")
@click.option("--parameters", is_flag=True, help="Write mu and logvar, too: what the encoder gives.")
def encode(checkpoint: str, data: str | None, out: Sequence[str], parameters: bool) -> None:
    """Recognise: write the mean E[z | x] of the posterior of every datapoint, and draw the means.

    CHECKPOINT is the folder of a run or a checkpoint file. DATA is a file as for train, or mnist:train,
    mnist:test; left out: the test data of the run. Row k of the result belongs to row k of the data. The .npz
    holds mean, float32 [N, latents]; mu and logvar are the posterior's location and 2 log(scale), for a
    Gaussian the mean and the log-variance.

    \b
    Example: vae-fast encode vae-fast-run mnist:test -o latents.npz
    """
    from . import datasets, plots, uses

    targets = [_output(name, (".npz", ".png")) for name in out]
    path = _checkpoint(checkpoint)
    trainer = _load_trainer(path)
    prepared, name = _data_of(trainer, path, data)
    codes = uses.encode(trainer.model, prepared)
    labels = datasets.mnist_labels()[name == "mnist:test"] if name in ("mnist:train", "mnist:test") else None
    arrays = codes._asdict() if parameters else {"mean": codes.mean}
    _write(targets, arrays, lambda: plots.latents(codes.mean, labels))
    click.echo(f"{len(codes.mean):,} datapoints, {codes.mean.shape[1]} latents: {', '.join(out)}")


@main.command(short_help="Encode and decode data.")
@_CHECKPOINT
@click.argument("data", required=False)
@_files("reconstructions.npy", "reconstructions.png")
@_SHAPE
def reconstruct(checkpoint: str, data: str | None, out: Sequence[str], image_shape: str) -> None:
    """Encode and decode: E[x | z] at the mean of the posterior of every datapoint.

    CHECKPOINT and DATA are as for encode. Row k of the .npy, float32 [N, features], belongs to row k of the
    data; the picture shows some of them.

    \b
    Example: vae-fast reconstruct vae-fast-run mnist:test -o reconstructions.png
    """
    from . import uses

    targets = [_output(name, (".npy", ".png")) for name in out]
    path = _checkpoint(checkpoint)
    trainer = _load_trainer(path)
    prepared, _ = _data_of(trainer, path, data)
    shape = _picture_shape(path, image_shape, prepared.width)
    x = prepared.batch(slice(None))
    found = uses.reconstruct(trainer.model, prepared)
    _write(targets, {"xhat": found}, lambda: _rows_picture({"Data": x, "Reconstructions": found}, shape))
    click.echo(f"{len(x):,} datapoints, mean squared error {_error(found, x):.5f}: {', '.join(out)}")


@main.command(short_help="Take the noise out of data.")
@_CHECKPOINT
@click.argument("data", required=False)
@click.option(
    "--kind",
    type=click.Choice(["salt-and-pepper", "masking", "gaussian"]),
    default="salt-and-pepper",
    help="Pixels set to 0 or 1, pixels set to 0, or normal noise added.",
)
@click.option(
    "--noise",
    type=_Positive(),
    default=0.3,
    help="Share of the pixels; of normal noise its standard deviation.",
)
@click.option("--as-is", is_flag=True, help="DATA are noisy as they come: no noise is put on them.")
@click.option(
    "--steps", type=click.IntRange(0), default=50, help="Of the search for z; 0: the encoder alone."
)
@_files("denoised.npz", "denoised.png")
@_SEED
@_SHAPE
def denoise(
    checkpoint: str,
    data: str | None,
    kind: str,
    noise: float,
    as_is: bool,
    steps: int,
    out: Sequence[str],
    seed: int,
    image_shape: str,
) -> None:
    """Put noise on data and take it out again: E[x | z] at the likeliest z given the noisy data.

    CHECKPOINT and DATA are as for encode. The .npz holds noisy and denoised, float32 [N, features]; the
    picture shows some of them, with the clean data.

    \b
    Example: vae-fast denoise vae-fast-run --noise 0.5
             vae-fast denoise vae-fast-run scans.npy --as-is --kind gaussian --noise 0.1
    """
    from . import uses

    targets = [_output(name, (".npz", ".png")) for name in out]
    path = _checkpoint(checkpoint)
    trainer = _load_trainer(path)
    prepared, _ = _data_of(trainer, path, data)
    shape = _picture_shape(path, image_shape, prepared.width)
    x, how = prepared.batch(slice(None)), kind.replace("-", "_")
    if kind != "gaussian" and noise >= 1:
        raise click.UsageError(f"--noise: found {noise:g}; wanted a share of the pixels, below 1")
    noisy = x if as_is else uses.corrupt(x, noise, kind=how, seed=seed)
    found = uses.denoise(trainer.model, noisy, noise, kind=how, steps=steps)
    rows = {"Noisy": noisy, "Denoised": found, **({} if as_is else {"Clean": x})}
    _write(targets, {"noisy": noisy, "denoised": found}, lambda: _rows_picture(rows, shape))
    error = (
        "" if as_is else f", mean squared error {_error(noisy, x):.5f} before, {_error(found, x):.5f} after"
    )
    click.echo(f"{len(x):,} datapoints{error}: {', '.join(out)}")


@main.command(short_help="Draw what lies where in latent space.")
@_CHECKPOINT
@click.argument("data", required=False)
@click.option("-n", "--number", type=click.IntRange(1), default=20, help="Images in a row.")
@_files("manifold.npy", "manifold.png")
@_SHAPE
def manifold(checkpoint: str, data: str | None, number: int, out: Sequence[str], image_shape: str) -> None:
    """Decode a grid of latent values, each image of equal share of the prior: the paper's figure 4.

    CHECKPOINT is the folder of a run or a checkpoint file. With more than two latents the two that are most
    active on DATA move (a file as for train, or mnist:train, mnist:test; left out: the test data of the run)
    and the others stay at 0. The .npy holds the images row by row, float32 [NUMBER * NUMBER, features].

    \b
    Example: vae-fast manifold vae-fast-run -n 15 -o manifold.png
    """
    from . import evaluation, plots, uses

    targets = [_output(name, (".npy", ".png")) for name in out]
    path = _checkpoint(checkpoint)
    trainer = _load_trainer(path)
    model, variance = trainer.model, None
    if (model.latent_dim or 0) > 2:
        variance = evaluation.active_units(model, _data_of(trainer, path, data)[0]).variance
    shape = _picture_shape(path, image_shape, model.data_dim or 0)
    if shape is None and any(target.suffix == ".png" for target in targets):
        raise click.UsageError(
            f"--image-shape: found none for data of {model.data_dim} features; "
            "wanted HEIGHTxWIDTH, or only -o manifold.npy"
        )
    images = uses.manifold(model, number, variance=variance)
    options: dict[str, Any] = {"image_shape": shape, "value_range": _range(images)}
    _write(targets, {"x": images}, lambda: plots.manifold(model, number, variance=variance, **options))
    click.echo(f"{len(images):,} images: {', '.join(out)}")


def _write(targets: Sequence[Path], arrays: Mapping[str, Tensor], picture: Callable[[], Figure]) -> None:
    """All is made before the first file is written."""
    import numpy as np

    from .report import write_atomically

    values = {name: array.float().numpy() for name, array in arrays.items()}
    payloads = [io.BytesIO() for _ in targets]
    for target, payload in zip(targets, payloads, strict=True):
        if target.suffix == ".png":
            picture().savefig(payload, format="png")
        elif target.suffix == ".npz":
            np.savez(payload, **values)  # type: ignore[arg-type]
        else:
            np.save(payload, next(iter(values.values())))
    for target, payload in zip(targets, payloads, strict=True):
        with _writing(str(target)):
            write_atomically(target, payload.getvalue())


def _rows_picture(rows: Mapping[str, Tensor], shape: Sequence[int] | None) -> Figure:
    """Evenly spaced datapoints, each above what was made of it; the last row sets the range of values."""
    from . import plots
    from .report import spread

    some = {title: part[spread(len(part), 20 if shape else 12)] for title, part in rows.items()}
    if shape is None:
        return plots.feature_rows(some)
    return plots.stacked(some, shape, value_range=_range(list(some.values())[-1]))


def _range(images: Tensor) -> tuple[float, float]:
    """Of black and white: 0 and 1, or more where there is more."""
    return min(0.0, float(images.min())), max(1.0, float(images.max()))


def _error(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean())


# ---- what the commands above share -------------------------------------------------------------------------


def _data_of(trainer: Trainer, path: Path, data: str | None) -> tuple[Prepared, str]:
    """These data, or the test data of the run, and what to call them."""
    if data is not None:
        return _model_data(trainer, path, data), data
    run = Run.load(path.parent)
    _, test_data, _ = _training_data(run)
    if test_data is None:
        raise click.UsageError("DATA: found none, and this run has no test data; wanted a file")
    if run.data == "mnist" and run.test is None:
        return test_data, "mnist:test"
    return test_data, f"the test data of {path.parent}"


def _picture_shape(path: Path, image_shape: str, width: int) -> tuple[int, ...] | None:
    """As given, or as in the run, or guessed; None for data that are no images."""
    from . import plots

    if image_shape == "guess" and (path.parent / RUN).exists():
        image_shape = Run.load(path.parent).image_shape
    shape = _image_shape(image_shape, width)
    return plots.image_shape(width) if isinstance(shape, str) else shape


def _checkpoint(path: str) -> Path:
    return Path(path) / CHECKPOINT if Path(path).is_dir() else Path(path)


def _model_data(trainer: Trainer, path: Path, data: str) -> Prepared:
    """Data read as those that the model was trained on."""
    from . import datasets

    targets = trainer.settings.targets
    if targets == "auto" and (path.parent / RUN).exists():
        targets = Run.load(path.parent).kind
    return datasets.prepare(
        _rows(data),
        likelihood=trainer.model.likelihood,
        targets=targets,
        pixel_scale=trainer.settings.pixel_scale,
        name=data,
        width=trainer.model.data_dim,
    )


def _rows(data: str) -> Tensor:
    """A file, FILE.npz:NAME, or mnist:train and mnist:test."""
    from . import datasets

    if data in ("mnist:train", "mnist:test"):
        return datasets.mnist()[data == "mnist:test"]
    path, colon, key = data.rpartition(":")
    if colon and path.endswith(".npz") and not Path(data).exists():
        return datasets.load(path, key=key)
    try:
        return datasets.load(data)
    except datasets.DataError as error:
        if "chosen by key" in str(error):
            raise datasets.DataError(f"{error}: {Path(data).name}:NAME") from error
        raise


def _image_shape(text: str, width: int) -> tuple[int, ...] | str | None:
    """As :func:`vae_fast.report.write_report` takes it."""
    if text in ("guess", "none"):
        return None if text == "none" else text
    import math

    shape = tuple(map(int, text.split("x")))
    if math.prod(shape) != width or (len(shape) == 3 and shape[2] not in (1, 3)):
        raise click.UsageError(
            f"--image-shape: found {text}; wanted sizes whose product is {width}, the width of the data"
        )
    return shape


def _output(out: str, suffixes: tuple[str, ...]) -> Path:
    """Checked before the work, not after it."""
    target = Path(out)
    if target.suffix not in suffixes:
        raise click.UsageError(f"--out: found {out!r}; wanted a name that ends in {' or '.join(suffixes)}")
    if not target.parent.is_dir():
        raise click.UsageError(f"--out: found no folder {str(target.parent)!r}; wanted one that exists")
    return target


@contextlib.contextmanager
def _writing(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise click.UsageError(
            f"--out: found {where}, which cannot be written ({error.strerror}); wanted another place"
        ) from error


def _absolute(data: str) -> str:
    return data if data.split(":")[0] == "mnist" else os.path.abspath(data)


def _shown(data: str) -> str:
    return "MNIST" if data == "mnist" else os.path.basename(data)


# ---- bench -------------------------------------------------------------------------------------------------


@main.command(short_help="Measure the operators on this machine, against PyTorch.")
@click.option("--quick/--full", default=True, help="Few shapes, about two minutes; or all, up to an hour.")
@click.option("--device", default="auto", help="cpu, cuda or cuda:1. auto: a GPU where there is one.")
@click.option(
    "--operators", metavar="NAMES", default="", help="Only these, such as gaussian_kl,reparameterize."
)
@click.option(
    "--seconds", type=click.FloatRange(0), help="Per line of the table. Default: as the device needs."
)
@click.option("--compile/--no-compile", default=True, help="Against torch.compile too, which takes its time.")
@click.option("--out", metavar="DIR", default="vae-fast-bench", help="Folder of the results.")
def bench(quick: bool, device: str, operators: str, seconds: float | None, compile: bool, out: str) -> None:
    """Measure the operators on this machine: speed, memory and accuracy, forward and backward.

    Beside ours stand eager PyTorch, torch.compile and a copy of the same bytes, timed in turns. Prints the
    tables, the lines where we lose among them, and writes operators.html, .json, .txt and .png.

    \b
    Example: vae-fast bench --operators gaussian_kl
    """
    import torch

    module = _bench_module("operators")
    only = [name for name in operators.split(",") if name]
    if unknown := set(only) - set(module.functions()):
        raise click.UsageError(
            f"--operators: found {', '.join(sorted(unknown))}; wanted some of {','.join(module.functions())}"
        )
    where = torch.device(_device(device))
    with _writing(out):
        Path(out).mkdir(parents=True, exist_ok=True)
    result = module.run(
        where,
        quick=quick,
        seconds=seconds,
        budget=100 if quick else 3600,
        only=only,
        compile=compile,
        command=shlex.join(["vae-fast", "bench", *_given(click.get_current_context(), without=("out",))]),
    )
    report = _bench_module("report")
    click.echo(report.text(result))
    with _writing(out):
        report.write(result, Path(out))
    click.echo(f"report: {Path(out) / 'operators.html'}")


def _bench_module(name: str) -> ModuleType:
    """A module of the folder bench/, which a wheel holds as vae_fast._bench."""
    package = f"{__package__}._bench"
    folder = Path(__file__).resolve().parent.parent / "bench"
    if importlib.util.find_spec(package) is None and package not in sys.modules:  # built in place
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None or not folder.is_dir():
            raise ImportError(f"the benchmarks are missing: found neither {package} nor {folder}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[package] = module
        spec.loader.exec_module(module)
    return importlib.import_module(f"{package}.{name}")


# ---- reproduce ---------------------------------------------------------------------------------------------

_REPRODUCED = ("variance", "figure2", "pixels", "figure3", "figure4", "figure5")  # with "all"
_TABLE = "table1"
_LEAST_DRAWS = 0.1  # of the variance experiment, which scale 1 does in about a minute


@main.command(short_help="Draw a figure of the paper again, over the paper's own.")
@click.argument("what", type=click.Choice([*_REPRODUCED, _TABLE, "all"]))
@click.option("--out", metavar="DIR", default="vae-fast-paper", help="Folder; what is in it goes on.")
@click.option(
    "--scale",
    type=_Positive(),
    default=0.01,
    help="Fraction of the paper's 10^8 samples per curve.",
)
@click.option("--panels", metavar="NAMES", help="Only these, such as mnist-20,frey-2 or n-1000.")
@click.option("--data", metavar="DIR", help="Folder of MNIST's four files. Default: the bundled ones.")
@click.option("--frey", metavar="FILE", help="Frey Face, uint8 [1965, 560]; left out without it.")
@click.option("--draw-only", is_flag=True, help="Draw what --out holds of a figure, and train nothing.")
@_SEED
@click.option(
    "--device", default="auto", help="cpu, cuda or cuda:1. auto: a GPU where this build can use one."
)
@_ENGINE
def reproduce(
    what: str,
    out: str,
    scale: float,
    panels: str | None,
    data: str | None,
    frey: str | None,
    draw_only: bool,
    seed: int,
    device: str,
    engine: str,
) -> None:
    """Train what a figure of the paper shows, and draw it over the paper's own curves.

    \b
    figure2   the bound while training: MNIST and Frey Face, AEVB and wake-sleep
    figure3   the marginal likelihood: AEVB, wake-sleep, Monte Carlo EM
    figure4   manifolds of two latent variables     figure5   samples from the prior
    variance  of the gradient estimators            pixels    which ones the paper took
    all       everything above
    table1    of Burda et al. 2015: VAE and IWAE, log p(x) and active units; --scale is of its 3280 passes

    Leaves a page, a picture, the numbers and the settings in --out. A killed command goes on when it is given
    again, a finished curve is not trained again, and a larger --scale continues the same curves. Curves end
    at the last tenth of a decade within --scale. For variance, --scale is the fraction of its draws, a tenth
    at least, and --engine is not asked.

    \b
    Example: vae-fast reproduce figure2 --scale 0.1 --panels mnist-3,mnist-20
    """
    from .experiments.curves import CurveError

    if panels is not None and what not in ("figure2", "figure3", _TABLE):
        raise click.UsageError(f"--panels: found it with {what}; wanted figure2, figure3 or table1")
    if draw_only and what in ("variance", _TABLE, "all"):
        raise click.UsageError(f"--draw-only: found it with {what}; wanted one of the figures")
    command = shlex.join(["vae-fast", "reproduce", *_given(click.get_current_context(), without=())])
    how: dict[str, Any] = {"seed": seed, "device": _device(device)}
    _check_native(engine, how["device"])
    with _writing(out):
        Path(out).mkdir(parents=True, exist_ok=True)
    said: set[str] = set()
    try:
        for name in _REPRODUCED if what == "all" else (what,):
            module = importlib.import_module(f"{__package__}.experiments.{name}")
            if name == "variance":
                from . import datasets

                train = None if data is None else datasets.mnist(data)[0]
                result = module.run(out, train=train, scale=max(scale, _LEAST_DRAWS), **how)
                click.echo(result.table(), nl=False)
                click.echo(f"{name}: {Path(out) / module.FIGURE}")
                continue
            options = {**how, "engine": engine, "scale": scale, "mnist": data}
            if panels is not None:
                options["panels"] = panels.split(",")
            if name == _TABLE:
                result = module.run(out, **options)
                click.echo(result.table(), nl=False)
                click.echo(f"{name}: {Path(out) / module.TABLE}")
                continue
            options["command"] = command
            options["draw_only"] = draw_only
            if name in ("figure2", "figure4"):
                options["frey"] = frey
            result = module.run(out, **options)
            notes = result["notes"] if isinstance(result, dict) else result.notes
            for note in [note for note in notes if note not in said]:
                said.add(note)
                click.echo(note, err=True)
            if not isinstance(result, dict):
                for verdict in result.verdicts:
                    click.echo(str(verdict))
            click.echo(f"{name}: {Path(out) / f'{name}.html'}")
    except KeyboardInterrupt as interrupt:
        stopped = str(interrupt) or "stopped at once; the last checkpoint is whole"
        _fail(f"{stopped}. To go on: {command}", 130)
    except CurveError as error:
        raise click.UsageError(str(error)) from error


# ---- doctor ------------------------------------------------------------------------------------------------


@main.command(short_help="Check this installation.")
def doctor() -> None:
    """Check this installation, and say what to do where something is wrong.

    Versions, CUDA or why not, the CPU's instruction set, and every operator against float64. Exit code 1 if a
    check fails.

    \b
    Example: vae-fast doctor
    """
    from .doctor import examine

    failures = 0
    for finding in examine():
        failures += finding.state == "FAIL"
        click.echo(f"{finding.state:<5} {finding.subject:<14} {finding.text}")
        if finding.remedy:
            click.echo(f"{'':<20} {finding.remedy}")
    click.echo("all is well" if not failures else f"{failures} of these checks failed")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main(prog_name="vae-fast")
