"""What ``accelerate launch`` starts in tests/test_launch.py: commands, one after another, that note which samples a step has."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerCallback

from fastkd.cli import main
from fastkd.trainer import KDTrainer

DIES_AT = 5


@contextmanager
def noted(file: Path) -> Iterator[None]:
    """Writes ``[step, sample_index of each row]`` of every micro-batch to ``file``, a line each."""
    compute_loss = KDTrainer.compute_loss
    with file.open("w", buffering=1) as stream:  # a line at a time, as the process may be killed

        def noting(self, model, inputs, *args, **kwargs):
            if model.training:
                stream.write(json.dumps([self.state.global_step, inputs["sample_index"].tolist()]) + "\n")
            return compute_loss(self, model, inputs, *args, **kwargs)

        KDTrainer.compute_loss = noting
        try:
            yield
        finally:
            KDTrainer.compute_loss = compute_loss


class Dies(TrainerCallback):
    """As if the machine went off."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == DIES_AT and Path(args.output_dir).name == "cut":
            os.kill(os.getpid(), signal.SIGKILL)


def _dying(init):
    def with_callback(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.add_callback(Dies())

    return with_callback


if __name__ == "__main__":
    KDTrainer.__init__ = _dying(KDTrainer.__init__)
    for command in json.loads(sys.argv[1]):
        name = next(word.removeprefix("output_dir=") for word in command if word.startswith("output_dir="))
        with noted(Path(f"order-{name}-{os.environ['RANK']}.jsonl")):
            assert main(command) == 0
