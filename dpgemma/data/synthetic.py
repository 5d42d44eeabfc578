"""A fictional corpus of clinic notes, built locally with TFDS: names, dates, codes and secrets worth not memorising.

Nothing in it describes a real person: every value is drawn from lists below by a fixed seed.
"""

import contextlib
import fcntl
import os
import pathlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

NUM_NOTES = 6000

_GIVEN = [
    "Ada",
    "Bashir",
    "Chiara",
    "Dmitri",
    "Elif",
    "Farid",
    "Greta",
    "Hamza",
    "Ines",
    "Jonas",
    "Kaya",
    "Lior",
    "Mina",
    "Nils",
    "Oona",
    "Pavel",
    "Quinn",
    "Rosa",
    "Samir",
    "Tova",
    "Uma",
    "Viktor",
    "Wren",
    "Yusuf",
    "Zita",
]
_FAMILY = [
    "Abara",
    "Bergström",
    "Castellano",
    "Dufour",
    "Eriksen",
    "Farouk",
    "Grünwald",
    "Haddad",
    "Ivanova",
    "Jansen",
    "Kowalski",
    "Lindqvist",
    "Moreau",
    "Nakagawa",
    "Okafor",
    "Petrov",
    "Quispe",
    "Rossi",
    "Sørensen",
    "Takeda",
    "Ueda",
    "Varga",
    "Weiss",
    "Yilmaz",
    "Zanetti",
]
_COMPLAINTS = [
    "a dry cough for three weeks",
    "pain in the left knee after running",
    "dizziness on standing up",
    "a rash on both forearms",
    "poor sleep since the move",
    "blurred vision in the evenings",
    "chest tightness under stress",
    "numb fingers at night",
    "a sore throat and mild fever",
    "headaches behind the right eye",
    "back pain after lifting",
    "loss of appetite",
]
_FINDINGS = [
    "Lungs clear on both sides.",
    "Blood pressure {s} over {d}.",
    "No swelling, full range of movement.",
    "Pulse regular at {p}.",
    "Temperature {t} degrees.",
    "Reflexes symmetrical.",
    "Skin dry, no sign of infection.",
    "Weight {w} kg, stable since spring.",
]
_PLANS = [
    "Rest and fluids, review in {n} days.",
    "Start {drug} {mg} mg once daily.",
    "Referred to physiotherapy, {n} sessions.",
    "Blood panel ordered, results by phone.",
    "Stop {drug}, keep a symptom diary.",
    "X-ray if no better after {n} days.",
]
_DRUGS = [
    "amoxicillin",
    "ibuprofen",
    "lisinopril",
    "metformin",
    "omeprazole",
    "sertraline",
    "loratadine",
    "atorvastatin",
]
_WARDS = ["Harbour Street Clinic", "Northgate Practice", "Linden Health Centre", "Riverside Surgery"]
_OPENINGS = [
    "{name}, {age}, presents with {complaint}.",
    "{name} (age {age}) reports {complaint}.",
    "Seen today: {name}, {age} years, {complaint}.",
]


def note(rng: random.Random) -> str:
    """One fictional note of a few hundred characters."""
    name = f"{rng.choice(_GIVEN)} {rng.choice(_FAMILY)}"
    values = dict(
        name=name, age=rng.randint(4, 95), complaint=rng.choice(_COMPLAINTS), s=rng.randint(100, 170),
        d=rng.randint(60, 100),
        p=rng.randint(52, 104), t=f"{rng.uniform(36.0, 39.5):.1f}", w=rng.randint(41, 118), n=rng.randint(2, 21),
        drug=rng.choice(_DRUGS), mg=rng.choice((5, 10, 20, 50, 100, 250, 500)),
    )  # fmt: skip
    code = f"{rng.choice('ABCDEFGHJKMN')}{rng.randint(0, 99):02d}.{rng.randint(0, 9)}"
    date = f"{rng.randint(1, 28):02d}.{rng.randint(1, 12):02d}.20{rng.randint(15, 25)}"
    lines = [
        f"{rng.choice(_WARDS)} | {date} | record {rng.randint(100000, 999999)}",
        rng.choice(_OPENINGS).format(**values),
        " ".join(rng.sample(_FINDINGS, rng.randint(1, 4))).format(**values),
        f"Diagnosis {code}. " + " ".join(rng.sample(_PLANS, rng.randint(1, 3))).format(**values),
    ]
    if rng.random() < 0.5:
        lines.append(
            f"Next of kin: {rng.choice(_GIVEN)} {rng.choice(_FAMILY)}, phone 0{rng.randint(100, 999)}"
            f" {rng.randint(100000, 999999)}."
        )
    if rng.random() < 0.3:
        lines.append(f"Portal password on file: {''.join(rng.choices('abcdefghijkmnpqrstuvwxyz23456789', k=10))}.")
    return "\n".join(lines)


class ClinicNotes(tfds.core.GeneratorBasedBuilder):
    """Fictional clinic notes, `{"text": bytes}`, in a stable order."""

    VERSION = tfds.core.Version("1.0.0")
    MODULE_PATH = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Fictional clinic notes for training runs that need no private data.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> Any:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[Any]:
        rng = random.Random("dpgemma clinic notes 1.0.0")
        for key in range(NUM_NOTES):
            yield key, {"text": note(rng)}


def cache_directory() -> pathlib.Path:
    """Where generated corpora are kept: $DPGEMMA_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(os.environ.get("DPGEMMA_CACHE") or os.path.join(base, "dpgemma"))


def prepared() -> ClinicNotes:
    """The builder, its ArrayRecord files written on first use, by one process at a time."""
    folder = cache_directory()
    builder = ClinicNotes(data_dir=folder, file_format="array_record")
    if not builder.is_prepared():
        folder.mkdir(parents=True, exist_ok=True)
        tfds.disable_progress_bar()
        with (
            open(folder / "clinic_notes.lock", "w") as lock,
            contextlib.redirect_stdout(sys.stderr),  # TFDS announces itself on standard output
        ):
            fcntl.flock(lock, fcntl.LOCK_EX)
            builder = ClinicNotes(data_dir=folder, file_format="array_record")
            builder.download_and_prepare()
    return builder
