"""A run from Python: train a small Gemma on a text file under a budget, read its report, and let it write.

python examples/train_and_sample.py FILE FOLDER
"""

import json
import pathlib
import sys

import dpgemma
from dpgemma.gemma.answers import answer
from dpgemma.gemma.sampling_settings import SamplingSettings
from dpgemma.training.observers import Silent


class Watcher(Silent):
    """An observer: the trainer itself prints nothing."""

    def inform(self, message: str) -> None:
        print(message)


def main(file: str, folder: str, steps: int = 20) -> str:
    """Trains in a new folder, or goes on with the run that is there, and returns what the model writes."""
    settings = dpgemma.Settings(
        model="ladder_20k", data=file, sequence_length=64, batch_size=64, steps=steps, epsilon=8.0, delta=1e-5
    )
    trainer = dpgemma.prepare(settings, folder, epsilon_given=True, observers=[Watcher()])
    measured = trainer.train()
    trainer.run.unlock()
    report = json.loads((pathlib.Path(folder) / "report.json").read_text())
    print(f"epsilon {report['epsilon']} at delta {report['delta']}; held-out {measured}")
    model = dpgemma.load(folder)
    chosen = SamplingSettings(max_new_tokens=40, seed=1)
    return answer(model.config, model.parameters, model.require_tokenizer(), ["The "], chosen)[0]


if __name__ == "__main__":
    print(main(*sys.argv[1:3]))
