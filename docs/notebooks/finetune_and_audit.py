# %% [markdown]
# # Fine-tune a Gemma privately, evaluate it, audit the run
#
# `BASE` is a Hugging Face directory, or a name on the hub that was downloaded before (`hf download NAME`). Without one,
# a small model with random weights takes its place, so that this page runs anywhere.

# %%
import json
import os
import pathlib
import random
import tempfile

import dpgemma

folder = pathlib.Path(tempfile.mkdtemp())
random.seed(0)
complaints, advice = ["cough", "fever", "rash"], ["rest", "tea", "come back"]
with open(folder / "notes.jsonl", "w") as file:
    for number in range(400):
        what = random.choice(complaints)
        asked = f"Patient {number % 90} came with a {what}. Advice: "
        answer = advice[complaints.index(what)] + "."
        file.write(json.dumps({"patient": number % 90, "prompt": asked, "response": answer}) + "\n")

# %%
start = {"init_from": os.environ["BASE"], "lora_rank": 8} if "BASE" in os.environ else {"model": "ladder_45k"}
settings = dpgemma.Settings(
    **start,
    data=str(folder / "notes.jsonl"),
    privacy_unit="user",  # a patient's notes are protected together, not one by one
    user_field="patient",
    epsilon=8.0,
    delta=1e-4,
    steps=int(os.environ.get("STEPS", 30)),
    batch_size=20,
    sequence_length=64,
)
with dpgemma.prepare(settings, str(folder / "run")) as trainer:
    print("held-out patients:", trainer.train())

# %%
model = dpgemma.load(str(folder / "run"))
found = dpgemma.evaluate(model, str(folder / "notes.jsonl"), sequence_length=64)
low, high = found.interval
print(f"{found.bits_per_byte:.2f} bits/byte of the responses, 95 % between {low:.2f} and {high:.2f}")

# %%
result = dpgemma.audit(str(folder / "run"))
print(result.text())
report = json.loads((folder / "run" / "report.json").read_text())
print(report["statement"])

# %%
dpgemma.export(model, folder / "export")
print(sorted(path.name for path in (folder / "export").iterdir()))
