"""The grid of a sweep, as a TOML file declares it: every run is one configuration of the ordinary trainer.

    [sweep]
    public_data = true              # nobody's privacy is at stake in these data

    [train]                         # settings of `dpgemma train` that all runs share
    data = "corpus.txt"
    sequence_length = 64
    batch_size = 32                 # the physical batch, the same for all
    schedule = "constant"           # so that every point of a curve is the end of a shorter run

    [model.mine]                    # sizes of one's own for VaultGemma's block; max_length and vocab_size may follow
    layers = 4
    d_model = 128
    heads = 4
    d_ff = 320

    [[grid]]                        # every combination of the lists; further [[grid]] tables add to them
    model = ["ladder_20k", "ladder_95k", "mine"]
    noise_batch_ratio = [0, "2^-7", "2^-5"]
    learning_rate = ["2^-7", "2^-8"]
    steps = 640
    held_out = false                # true: trained, but left out of the law, to test it

Noise is injected as a noise-batch ratio, the standard deviation of the noise on the mean gradient in clip norms: runs
with the same ratio have the same dynamics whatever their (epsilon, delta), and privacy is accounted for afterwards
(arXiv 2501.18914, section 2).

Where the file does not say otherwise, a run has one device (mesh = "data:1"), so that it computes the same bits
wherever it is executed. A run that is long enough for a trial of clipping may still be computed in another way on
another machine: say clipping and microbatch_size to have the same bits there too.
"""

import dataclasses
import itertools
import math
import pathlib
import re
import tomllib
import typing

from accounting.errors import InputError
from dpgemma.gemma import presets
from dpgemma.training.settings import Settings

RATIO, HELD_OUT = "noise_batch_ratio", "held_out"
# Of every setting, the type of its values: a number that the file writes as 1 and one that it writes as 1.0 are the
# same setting.
_KINDS = {name: (typing.get_args(hint) or (hint,))[0] for name, hint in typing.get_type_hints(Settings).items()} | {
    RATIO: float
}
# What a grid says in terms of the noise-batch ratio, a setting of the same run may not say too.
_DERIVED = ("noise_multiplier", "epsilon")
_LARGEST = 10**18
_FROM_WEIGHTS = ("init_from", "lora_rank", "lora_alpha", "lora_targets")
_DEFAULTS = {"model": "tiny", "mesh": "data:1"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One configuration: its settings, and whether the law is to be tested on it instead of fitted to it."""

    config: Settings
    held_out: bool = False

    @property
    def id(self) -> str:
        """The first digits of the settings' hash: the name of the run's folder."""
        return self.config.digest()[:12]

    @property
    def noise_batch_ratio(self) -> float:
        return self.config.noise_multiplier / self.config.batch_size

    def arguments(self, workdir: str) -> list[str]:
        """The `dpgemma` command that is this run, without the program's name."""
        defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
        # The target is always said: with a noise multiplier, an omitted epsilon would be solved for.
        given = {
            name: value for name, value in self.config.as_dict().items() if value != defaults[name] or name == "epsilon"
        }
        return [
            "train",
            *(f"--{name}={value}" for name, value in given.items() if value is not None),
            f"--workdir={workdir}",
        ]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The runs that a file declares.

    Attributes:
      runs: in the order of the file, each once.
      public_data: whether the data are declared to be nobody's secret.
    """

    runs: tuple[Run, ...]
    public_data: bool


def read(path: pathlib.Path) -> Grid:
    """The grid of a TOML file.

    Raises:
      InputError: no such file, no TOML, or settings that do not exist or do not go together; nothing has been run then.
    """
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give the TOML file of a sweep") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is no TOML: {error}") from None
    return parse(content, str(path))


def parse(content: dict, where: str) -> Grid:
    """The grid of a TOML file's content."""
    unknown = [name for name in content if name not in ("sweep", "train", "model", "grid")]
    if unknown:
        raise InputError(
            f"{where} has an unknown table [{unknown[0]}]: use [sweep], [train], [model.NAME] and [[grid]]"
        )
    sweep, shared, tables = content.get("sweep", {}), content.get("train", {}), content.get("grid", [])
    if not (isinstance(sweep, dict) and isinstance(shared, dict)):
        raise InputError(f"{where}: sweep and train must be tables: write [sweep] and [train]")
    if not (isinstance(tables, list) and all(isinstance(table, dict) for table in tables)):
        raise InputError(f"{where}: grid must be an array of tables: write [[grid]]")
    unknown = [name for name in sweep if name != "public_data"]
    if unknown:
        raise InputError(f"{where}: [sweep] has no setting {unknown[0]!r}: it knows public_data")
    if not isinstance(sweep.get("public_data"), bool):
        raise InputError(
            f"{where}: [sweep] must say public_data = true (nobody's privacy is at stake) or false (the report then"
            " adds up every run)"
        )
    models = _models(content.get("model", {}), where)
    if not tables:
        raise InputError(
            f"{where} declares no run: add a [[grid]] table with model, noise_batch_ratio, learning_rate and steps"
        )
    runs: dict[str, Run] = {}
    for table in tables:
        for run in _runs(shared, table, models, where):
            # A configuration that is named twice is one run; it tests the law only if no table wants it fitted.
            known = runs.get(run.id)
            runs[run.id] = run if known is None else dataclasses.replace(run, held_out=known.held_out and run.held_out)
    return Grid(tuple(runs.values()), sweep["public_data"])


def _models(tables, where: str) -> dict[str, str]:
    """Of each [model.NAME] table the name by which `dpgemma train` knows its sizes."""
    if not (isinstance(tables, dict) and all(isinstance(sizes, dict) for sizes in tables.values())):
        raise InputError(f"{where}: model must hold tables: write [model.NAME]")
    found = {}
    for name, sizes in tables.items():
        if name in presets.PRESETS:
            raise InputError(f"{where}: [model.{name}] has the name of a preset: choose another")
        keys = dict.fromkeys((*presets.BLOCK_SIZES, *presets.BLOCK_EXTRAS, *sizes))  # one order, however written
        found[name] = presets.BLOCK + ",".join(f"{key}={sizes[key]}" for key in keys if key in sizes)
        try:
            presets.named(found[name])
        except InputError as error:
            raise InputError(f"{where}: [model.{name}]: {error}") from None
    return found


def _runs(shared: dict, table: dict, models: dict[str, str], where: str) -> list[Run]:
    given = {**_DEFAULTS, **shared, **table}
    held_out = given.pop(HELD_OUT, False)
    if not isinstance(held_out, bool):
        raise InputError(f"{where}: held_out must be true or false, got {held_out!r}")
    for name in given:
        if name in _DERIVED:
            raise InputError(
                f"{where}: {name} is not a grid's to set: give noise_batch_ratio, and account for privacy afterwards"
            )
        if name in _FROM_WEIGHTS:
            raise InputError(
                f"{where}: {name} is not a grid's to set: a sweep trains presets from random weights; to compare"
                " settings of fine-tuning, give dpgemma train each of them, and add up their budgets (dpgemma account"
                " --compose)"
            )
        if name not in _KINDS:
            raise InputError(f"{where}: {name!r} is no setting of dpgemma train: dpgemma train --help lists them")
    if RATIO not in given:
        raise InputError(f'{where}: a [[grid]] needs noise_batch_ratio, such as [0, "2^-8", "2^-6"]')
    axes = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    for name, values in axes.items():
        if not values:
            raise InputError(f"{where}: {name} is an empty list: name at least one value")
    runs = []
    for values in itertools.product(*axes.values()):
        settings = {name: _value(name, value, where) for name, value in zip(axes, values, strict=True)}
        settings["model"] = models.get(settings["model"], settings["model"])
        runs.append(Run(_config(settings, where), held_out))
    return runs


def _config(settings: dict, where: str) -> Settings:
    ratio = settings.pop(RATIO)
    if not 0 <= ratio < math.inf:
        raise InputError(f"{where}: noise_batch_ratio must be finite and not negative, got {ratio}")
    try:
        config = Settings(**settings, epsilon=math.inf, noise_multiplier=0.0)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if math.isinf(config.clip_norm):
        raise InputError(
            f"{where}: noise is measured in clip norms: clip_norm must be finite, at noise_batch_ratio 0 too"
        )
    return dataclasses.replace(config, noise_multiplier=ratio * config.batch_size)


def _value(name: str, value, where: str):
    """A setting's value, of the setting's type."""
    kind = _KINDS[name]
    if kind is str and isinstance(value, str):
        return value
    if kind is float:
        number = _power(value) if isinstance(value, str) else value
        if isinstance(number, (int, float)) and not isinstance(number, bool) and not math.isnan(number):
            return float(number)
        raise InputError(f'{where}: {name} must be a number or a power such as "2^-7", got {value!r}')
    if (
        kind is int
        and not isinstance(value, bool)
        and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))
    ):
        if abs(value) > _LARGEST:
            raise InputError(f"{where}: {name} must be at most {_LARGEST:.0e}")
        return int(value)
    expected = "a whole number" if kind is int else "text"
    raise InputError(f"{where}: {name} must be {expected} or a list of such, got {value!r}")


def _power(text: str) -> float | None:
    """The number that a text such as "2^-7" stands for; None where it stands for none."""
    power = re.fullmatch(r"\s*(\d+)\s*\^\s*(-?\d+(?:\.\d+)?)\s*", text)
    try:
        return float(power[1]) ** float(power[2]) if power else None
    except (OverflowError, ZeroDivisionError):
        return None
