"""Figures of a run for TensorBoard: public ones in a folder of the user's, private ones in the run's private/."""

import pathlib
from typing import Any

from accounting.errors import InputError
from dpgemma.training.observers import Evaluated, Private, Released, Silent


class TensorBoard(Silent):
    """An observer that writes event files.

    Formal guarantee: the events of the public folder hold epsilon, the learning rate, figures of data that the operator
    declared to be nobody's secret, and the numbers of their steps, which are their times too, and nothing else. Tested
    by tests/training/evaluation_test.py::test_losses_go_to_private_files_unless_their_data_are_public.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Takes the public folder.

        Raises:
          InputError: the library that writes event files is missing.
        """
        try:
            import tensorboardX
        except ModuleNotFoundError:
            raise InputError("`tensorboard` needs another library: pip install 'dpgemma[tensorboard]'") from None
        self._make: Any = tensorboardX.SummaryWriter
        self._folder = folder
        self._public: Any = None
        self._private: Any = None

    def open(self, workdir: pathlib.Path, private: pathlib.Path) -> None:
        """Opens both folders once the run's is known.

        Raises:
          InputError: the public folder lies in the run's, where an audit would have to explain it.
        """
        if self._folder.absolute().is_relative_to(workdir.absolute()):
            raise InputError(f"`tensorboard`={self._folder} lies in the run's folder: give one outside of it")
        self._public = self._make(str(self._folder))
        self._private = self._make(str(private / "tensorboard"))

    def step(self, released: Released, private: Private) -> None:
        # How long a step takes depends on its units' rows: public events have the step for their time.
        for name, value in (("epsilon", released.epsilon), ("learning_rate", released.learning_rate)):
            self._public.add_scalar(name, value, released.steps, walltime=float(released.steps))
        self._private.add_scalar("loss", private.loss, released.steps)
        self._private.add_scalar("units", private.units, released.steps)
        for share, norm in zip((0.1, 0.5, 0.9), private.norm_quantiles, strict=False):
            self._private.add_scalar(f"gradient_norm/{share:g}", norm, released.steps)

    def evaluated(self, evaluated: Evaluated) -> None:
        writer = self._public if evaluated.is_public else self._private
        for name, value in evaluated.figures.items():
            writer.add_scalar(f"evaluation/{name}", value, evaluated.steps, walltime=float(evaluated.steps))

    def close(self) -> None:
        for writer in (self._public, self._private):
            if writer is not None:
                writer.close()
