"""Every setting of a training run, with its public default and its help text. `--help`, config.json and resume all read
this.
"""

import dataclasses
import hashlib
import json
import math
import numbers
import typing
from collections.abc import Mapping
from typing import Any

from accounting.errors import InputError
from accounting.mechanism import RELATIONS, ZERO_OUT
from accounting.mechanism.clip import SCALINGS
from dpgemma import choices
from dpgemma.choices import AUTO
from dpgemma.sharding.rules import SYNTAX
from dpgemma.storage import hub
from dpgemma.training import canary_settings, defaults

# So that float32 numbers hold what is multiplied with it.
_LARGEST = 1e30

# Of a document or user, where `rows_per_unit` is not given.
ROWS_PER_UNIT = 4

# Settings that change neither the mechanism nor the result, so a run may be resumed with others.
OPERATIONAL = ("checkpoint_every", "keep_checkpoints", "eval_data", "eval_every", "eval_limit", "public_eval_data")


def _setting(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


def _fitting(text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A setting that training.defaults takes from the model, where it is omitted."""
    return _setting(None, text, choices)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings as a user gives them; None and "auto" are resolved by training.plan. Defaults are constants, or follow
    from the model (training.defaults); none is taken from data.

    >>> Settings(steps=0)
    Traceback (most recent call last):
      ...
    accounting.errors.InputError: `steps` must be at least 1, got 0
    >>> Settings(model="vaultgemma_1b").learning_rate
    0.001
    """

    model: str | None = _setting(
        None,
        "Preset to train from random weights, such as tiny (the default) or vaultgemma_1b; or"
        " block:layers=6,d_model=256,heads=4,d_ff=640 for VaultGemma's block in sizes of your own (max_length and"
        " vocab_size may follow).",
    )
    init_from: str | None = _setting(
        None, "Hugging Face directory to start from: its architecture, weights and, by default, tokenizer."
    )
    lora_rank: int | None = _setting(
        None, "Rank of low-rank adapters; given, they alone are trained, and `init_from` stays as it is."
    )
    lora_alpha: float | None = _setting(None, "Scale of the adapters, divided by the rank; omitted, it is the rank.")
    lora_targets: str = _setting(
        "all", "Linear layers that get adapters: all, or some of q_proj,k_proj,v_proj,o_proj,gate_proj,..."
    )
    data: str = _setting(
        "synthetic",
        "synthetic, tfds:NAME prepared on disk, a token cache, or a file, glob or folder, on a disk or at gs:// or"
        " s3://: text, JSON lines, CSV, Parquet, Arrow, and on a disk ArrayRecord; random:N rehearses a run with N"
        " units of no meaning.",
    )
    text_field: str = _setting("text", "Field of a record that holds the text.")
    skip_bad_records: bool = _setting(False, "Leave out records that cannot be read; private/ says how many.")
    tokenizer: str | None = _setting(
        None,
        "byte, a SentencePiece .model file, or a Hugging Face directory; by default that of `init_from`, else byte.",
    )
    sequence_length: int = _fitting(
        "Tokens per row; by default 1024 within the model's context, and 128 for the small presets."
    )
    privacy_unit: str = _setting(
        AUTO,
        "What the guarantee protects: sequence (a row of packed text), example (a record with prompt and response,"
        " with messages, or with text, in a row of its own), document (a record in several rows) or user (all records"
        " of one `user_field`); auto looks at the fields of the first record and takes one of the first two.",
        choices.PRIVACY_UNITS,
    )
    user_field: str | None = _setting(
        None, "Field of a record that names its user; fields within fields are joined by dots."
    )
    records_without_user: str | None = _setting(
        None, "Records without a user: refuse (by default), or own, which makes each a unit.", choices.WITHOUT_USER
    )
    ownership: str | None = _setting(
        None,
        "Whose a record is: one user's (by default; others are refused), or several users', whose names are public and"
        " not protected: then records are drawn, at most `rows_per_unit` of each user, in the order of the data.",
        choices.OWNERSHIP,
    )
    user_sampling: str | None = _setting(
        None,
        "What is drawn where units are users: user (by default; the mean gradient of his rows is clipped), or example"
        " (each of his `rows_per_unit` rows by itself, empty ones included, with noise that hides all of them).",
        choices.USER_SAMPLING,
    )
    rows_per_unit: int | None = _setting(
        None,
        f"Most rows of a document or user, by default {ROWS_PER_UNIT}; with `clipping`=example_scan a unit costs the"
        " rows that it has, with other ways of clipping as many as these.",
    )
    rows_kept: str | None = _setting(
        None, "Which rows of a unit with more: uniform (at random, by default) or first.", choices.ROWS_KEPT
    )
    holdout_fraction: float = _setting(
        0.1, "Share of units held out for evaluation; they are not trained on and not covered."
    )
    neighbouring_relation: str = _setting("zero_out", "Neighbouring data sets.", RELATIONS)
    num_units: int | None = _setting(
        None, "Declared number of training units; needed under add_or_remove, where counting would leak."
    )
    epsilon: float = _setting(
        8.0,
        "Target epsilon; inf (with `clip_norm`=inf) trains the non-private baseline, and claims nothing whatever the"
        " noise.",
    )
    delta: float = _setting(1e-5, "Target delta.")
    prompt_histogram: str | None = _setting(
        None,
        "Public list of prompts, as `prompts` of synthesize takes it: how many units answer each is released under"
        " noise before the first step, as a part of the budget, for synthesize to draw prompts by.",
    )
    histogram_noise: float | None = _setting(
        None, "Standard deviation of the noise on each count of `prompt_histogram`, in units; by default 20."
    )
    canaries: int = _setting(
        0,
        "Made-up units to plant among the training units, each by a secret fair coin, so that `audit` can measure what"
        " leaks; the model is then one for audits alone.",
    )
    canary_kind: str | None = _setting(
        None,
        "What canaries are: random_tokens (by default), new_token (at the end one that no text has), synthetic"
        " (sampled from `canary_model`), or gradient (one number of the gradient each, for an attack that sees every"
        " step).",
        choices.CANARY_KINDS,
    )
    canary_repeats: str | None = _setting(
        None, "As how many units a canary is planted, in turn: 1 (by default), or several as in 1,4,16,64."
    )
    canary_model: str | None = _setting(
        None, "Hugging Face directory that canaries of the kind synthetic are sampled from; by default `init_from`."
    )
    canary_temperature: float | None = _setting(
        None, "Temperature at which they are sampled, at least 0.8; by default 1."
    )
    noise_multiplier: float | None = _setting(
        None, "Noise on the sum, in clip norms; omitted, it is solved from epsilon and delta."
    )
    clip_norm: float = _setting(
        1.0, "L2 bound of the gradient of each unit (with `user_sampling`=example of each row)."
    )
    batch_size: int = _fitting(
        "EXPECTED Poisson batch, in units; in rows with `user_sampling`=example. By default 512, or 1024 for models of"
        " 100 million parameters and more, and at most a quarter of the units."
    )
    max_batch_size: int | None = _setting(
        None, "Truncation cap of a batch; omitted, it is planned to cost 0.1 % of delta."
    )
    steps: int = _setting(160, "Number of updates.")
    clipping: str = _setting(
        AUTO,
        "How clipped gradients are computed: example_scan holds the gradients of few units at a time, ghost none, vmap"
        " is the definition; per_layer bounds every operation of every layer by itself. auto tries the first two on"
        " rows of noise, and keeps the faster one.",
        choices.CLIPPING,
    )
    microbatch_size: int | None = _setting(
        None, "Units per device that are computed at once; omitted, it is chosen with `clipping`."
    )
    clip_scaling: str = _setting(
        "clip",
        "How a gradient g is scaled. clip: g min(1, C / |g|) with C from `clip_norm`; normalise: g min(1, C / |g|) /"
        " C; automatic: g / (|g| + 0.01) (AUTO-S).",
        SCALINGS,
    )
    clip_thresholds: str = _setting(
        "uniform",
        "How per_layer divides `clip_norm`: equally, or by dimension (its square root).",
        choices.THRESHOLDS,
    )
    clip_quantile: float | None = _setting(
        None,
        "Share of units whose gradients shall not be clipped; given, the clip norm starts at `clip_norm` and adapts,"
        " under noise.",
    )
    release: str = _setting(
        choices.EXACT,
        "How sums are noised: exact adds whole numbers on a grid, so that the guarantee holds for the released bits;"
        " float32 rounds, which no proof covers, and is there for comparison.",
        choices.RELEASES,
    )
    optimizer: str = _setting("adamw", "Optimizer.", choices.OPTIMIZERS)
    learning_rate: float = _fitting(
        "Peak learning rate; by default it falls with the model's size and is lower for a checkpoint than from scratch,"
        " and lowest where all of one is trained."
    )
    warmup_steps: int = _fitting("Updates of linear warm-up; by default a sixteenth of `steps`, from 10 to 1000.")
    schedule: str = _setting("cosine", "Decay after warm-up, to a tenth of the peak.", choices.SCHEDULES)
    weight_decay: float = _setting(0.0, "Decoupled weight decay (adamw).")
    dtype: str = _fitting(
        "Type of activations and matrix products; norms stay float32. By default float32, or bfloat16 for models of 100"
        " million parameters and more.",
        choices.DTYPES,
    )
    remat: str = _fitting(
        "What the backward pass recomputes: none keeps activations, block recomputes each block, dots all but products"
        " with weights. By default none, or block for models of 100 million parameters and more.",
        choices.REMAT_POLICIES,
    )
    attention: str = _setting(
        AUTO,
        "How attention is computed: dense keeps all scores, blockwise a tile of them, fused is JAX's own (no"
        " soft-caps); auto is dense for rows of up to 1024 and blockwise for longer ones.",
        choices.ATTENTION,
    )
    attend_across_documents: bool = _setting(
        True,
        "Whether a token sees the texts before its own in a row (as VaultGemma was trained); if not, attention and"
        " positions begin anew with each text.",
    )
    mesh: str = _setting(AUTO, f"Devices: {SYNTAX}. On a CPU, auto makes one device per core, up to 8.")
    seed: int = _setting(0, "Public seed of the initial parameters. Sampling and noise never use it.")
    ledger_seal: str = _setting(
        "chain",
        "How the ledger is sealed: chain has no key; hmac is checked with the secret key, signature (or ed25519) with a"
        " public one.",
        choices.SEALS,
    )
    checkpoint_every: int = _setting(40, "Updates between checkpoints.")
    keep_checkpoints: int = _setting(3, "Checkpoints kept.")
    eval_data: str | None = _setting(
        None,
        "Records whose loss is measured while the run goes on, as `data` names them; by default the held-out units.",
    )
    eval_every: int | None = _setting(
        None,
        "Updates between such measurements; by default `checkpoint_every` with `eval_data`, and none without. The"
        " held-out units are measured at the end in any case. Losses go to your terminal and to private/, and decide"
        " nothing.",
    )
    eval_limit: int = _setting(
        8192, "The most units of a measurement, the first ones; held-out units lie in any order."
    )
    public_eval_data: bool = _setting(
        False, "Declares that `eval_data` are nobody's secret: their loss is shown anywhere."
    )

    def __post_init__(self) -> None:
        hints, fitting = typing.get_type_hints(Settings), []
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), field.metadata["choices"]
            if value is None and field.name in defaults.NAMES:
                fitting.append(field.name)
                continue
            if allowed and value is not None and value not in allowed:
                raise InputError(f"`{field.name}` must be one of {', '.join(allowed)}, got {value!r}")
            if isinstance(value, numbers.Real) and not isinstance(value, (int, float)):  # a scalar of NumPy
                value = int(value) if isinstance(value, numbers.Integral) else float(value)
                object.__setattr__(self, field.name, value)
            kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
            fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
            if not fits or (isinstance(value, bool) and bool not in kinds):
                raise InputError(f"`{field.name}` must be of type {kinds[0].__name__}, got {value!r}")
        if self.steps < 1:
            raise InputError(f"`steps` must be at least 1, got {self.steps}")
        if self.ledger_seal == choices.ED25519:
            object.__setattr__(self, "ledger_seal", choices.SIGNATURE)
        object.__setattr__(self, "_omitted", tuple(fitting))
        if fitting:
            self._fill(fitting)
        for name in (
            "sequence_length",
            "batch_size",
            "microbatch_size",
            "checkpoint_every",
            "keep_checkpoints",
            "eval_every",
            "eval_limit",
            "rows_per_unit",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if not self.data:
            raise InputError("`data` is empty: name a file, a folder, a glob, or leave it out for the synthetic corpus")
        if self.public_eval_data and not self.eval_data:
            raise InputError("`public_eval_data` speaks of data that nobody gave: give `eval_data`, or drop it")
        self._check_units()
        canary_settings.check(self)
        if self.histogram_noise is not None and self.prompt_histogram is None:
            raise InputError(
                "`histogram_noise` is noise on the counts of `prompt_histogram`: give that too, or neither"
            )
        if self.prompt_histogram and self.ownership == choices.PUBLIC_OWNERS:
            raise InputError(
                "a unit that shares its records has no share of a count of its own: drop `prompt_histogram`, or"
                " `ownership`=public"
            )
        if self.attention == choices.FUSED and not self.attend_across_documents:
            raise InputError(
                "`attention`=fused is attention over whole rows, which `attend_across_documents`=false is not: use"
                " dense or blockwise"
            )
        if self.lora_rank is not None and self.init_from is None:
            raise InputError("adapters need weights to adapt: give `init_from`=FOLDER, or drop `lora_rank`")
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_targets != "all"):
            raise InputError(
                "`lora_alpha` and `lora_targets` have no meaning without `lora_rank`: give it, or neither of them"
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"`seed` must be at least 0 and below 2^32, got {self.seed}")
        if not 0 <= self.holdout_fraction < 1:
            raise InputError(f"`holdout_fraction` must be at least 0 and below 1, got {self.holdout_fraction:g}")
        if not 0 < self.delta < 1:
            raise InputError(f"`delta` must lie between 0 and 1, got {self.delta:g}")
        if not self.epsilon >= 0:
            raise InputError(f"`epsilon` must not be negative, got {self.epsilon:g}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise InputError(f"`learning_rate` must be positive and finite, got {self.learning_rate:g}")
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            if _LARGEST < getattr(self, name) < math.inf or (name == "weight_decay" and math.isinf(self.weight_decay)):
                raise InputError(f"`{name}` must be at most {_LARGEST:g}, got {getattr(self, name):g}")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise InputError("`warmup_steps` and `weight_decay` must not be negative")
        if self.clip_thresholds != "uniform" and self.clipping != "per_layer":
            raise InputError("`clip_thresholds` divides the norm among layers: give `clipping`=per_layer, or drop it")
        if self.clip_scaling == "automatic" and (self.clip_norm != 1 or self.clip_quantile is not None):
            raise InputError("`clip_scaling`=automatic has no clip norm: drop `clip_norm` and `clip_quantile`")
        if self.clip_scaling != "clip" and math.isinf(self.clip_norm):
            raise InputError(f"`clip_scaling`={self.clip_scaling} needs a finite `clip_norm`")
        if self.clip_quantile is not None and not 0 < self.clip_quantile < 1:
            raise InputError(f"`clip_quantile` must lie between 0 and 1, got {self.clip_quantile:g}")
        if self.clip_quantile is not None and (math.isinf(self.clip_norm) or self.clipping == "per_layer"):
            raise InputError(
                "`clip_quantile` adapts one finite clip norm of the whole gradient: drop it, `clip_norm`=inf or"
                " per_layer"
            )
        if math.isinf(self.clip_norm) and math.isfinite(self.epsilon):
            raise InputError(
                "`clip_norm`=inf bounds nobody's influence, so no finite epsilon holds: give a finite `clip_norm`, or"
                " `epsilon`=inf"
            )

    def _fill(self, omitted: list[str]) -> None:
        """Gives settings that were left out the values that fit the model.

        Raises:
          InputError: there is no such model.
        """
        from dpgemma.gemma import decoder, start
        from dpgemma.gemma.files import config_json

        if self.init_from is None:
            model = start.of_preset(self.model).model
        else:
            model = config_json.read(hub.located(self.init_from))
        found = defaults.of(
            decoder.num_parameters(model),
            model.max_length,
            self.steps,
            from_checkpoint=self.init_from is not None,
            adapters=self.lora_rank is not None,
        )
        for name in omitted:
            object.__setattr__(self, name, getattr(found, name))

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Those of a run's config.json, for whatever devices are here."""
        given = {field.name: config[field.name] for field in dataclasses.fields(cls) if field.name in config}
        return cls(**given | {"mesh": AUTO})

    @property
    def omitted(self) -> tuple[str, ...]:
        """Names of the settings that were left out and follow from the model."""
        found: tuple[str, ...] = self.__dict__["_omitted"]
        return found

    def with_fitting_batch(self, num_items: int) -> "Settings":
        """These settings with a batch that was left out of at most a quarter of what it is drawn from."""
        if "batch_size" not in self.omitted or self.batch_size <= num_items // 4:
            return self
        return self.replaced(batch_size=max(1, num_items // 4))

    def replaced(self, **changes: Any) -> "Settings":
        """These settings with some changed, which still know what was left out."""
        changed = dataclasses.replace(self, **changes)
        object.__setattr__(changed, "_omitted", self.omitted)
        return changed

    def _check_units(self) -> None:
        of_rows, of_users = (
            ("rows_per_unit", "rows_kept"),
            ("user_field", "records_without_user", "user_sampling", "ownership"),
        )
        unknown = [*(of_rows if self.privacy_unit not in choices.OF_SEVERAL_ROWS else [])]
        unknown += of_users if self.privacy_unit != choices.USER else []
        given = [name for name in unknown if getattr(self, name) is not None]
        if given:
            units = "user" if given[0] in of_users else "document or user"
            raise InputError(f"`{given[0]}` has no meaning with this `privacy_unit`: drop it, or give {units}")
        if self.privacy_unit == choices.USER and not self.user_field:
            raise InputError("`privacy_unit`=user needs the field that names a record's user: give `user_field`")
        if self.ownership == choices.PUBLIC_OWNERS:
            self._check_public_ownership()

    def _check_public_ownership(self) -> None:
        if self.user_sampling != choices.BY_EXAMPLE:
            raise InputError("a record of several users is drawn by itself: give `user_sampling`=example")
        if self.neighbouring_relation != ZERO_OUT:
            raise InputError(
                "records that users share do not go with one of them: give `neighbouring_relation`=zero_out"
            )
        if self.holdout_fraction:
            raise InputError(
                "a user may have records on both sides of a hold-out, which would cover only some: give"
                " `holdout_fraction`=0"
            )
        if self.rows_kept is not None:
            raise InputError("records of several users are kept in the order of the data: drop `rows_kept`")

    @property
    def kind_of_canary(self) -> str | None:
        """One of choices.CANARY_KINDS; None where none are planted."""
        return (self.canary_kind or choices.RANDOM_TOKENS) if self.canaries else None

    @property
    def planted_repeats(self) -> tuple[int, ...]:
        """As how many units canaries are planted, in turn."""
        return canary_settings.repeats(self.canary_repeats)

    @property
    def units(self) -> dict[str, Any]:
        """What says which rows a unit of several rows has, with defaults; empty for other units."""
        if self.privacy_unit not in choices.OF_SEVERAL_ROWS:
            return {}
        of_users, shared = self.privacy_unit == choices.USER, self.ownership == choices.PUBLIC_OWNERS
        return {
            "rows_per_unit": self.rows_per_unit or ROWS_PER_UNIT,
            "rows_kept": self.rows_kept or (choices.FIRST_ROWS if shared else choices.UNIFORM_ROWS),
            "user_field": self.user_field,
            "records_without_user": (self.records_without_user or choices.REFUSE) if of_users else None,
            "user_sampling": (self.user_sampling or choices.USER) if of_users else None,
            "ownership": (self.ownership or choices.ONE_OWNER) if of_users else None,
        }

    @property
    def items_per_unit(self) -> int:
        """Items of a unit that are drawn by themselves: its rows, empty ones included, or 1 for the whole of it."""
        return (self.rows_per_unit or ROWS_PER_UNIT) if self.user_sampling == choices.BY_EXAMPLE else 1

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def identity(self) -> dict[str, Any]:
        """The settings that make a run the same run."""
        return {name: value for name, value in self.as_dict().items() if name not in OPERATIONAL}

    def digest(self) -> str:
        """Hash of the identity; the first 8 digits name the default work directory."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
