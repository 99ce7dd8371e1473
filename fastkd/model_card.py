"""The model card of a distilled student, and what of a run's folder is pushed to the hub."""

import functools
import importlib.metadata
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ._version import __version__
from .files import write_whole
from .report import EVALUATION, METRICS, PLAN, format_metric, read_metrics, stage_table

__all__ = ["ADAPTER", "CARD", "CardFacts", "HubTrainer", "hub_id", "model_card", "public_name", "versions"]

CARD = "README.md"
ADAPTER = "adapter_config.json"
_STAGED = "_hub-"
# What a run's folder holds besides the student that is nobody else's business, or of use to nobody else. The plan names the user's files,
# as the adapter of a merged student does, the pickled arguments may hold a token.
_KEPT_BACK = ("_*", ".*", "checkpoint-*", "adapter/*", "*.tmp", "*.parquet*", PLAN, "training_args.bin")
_STATES = (
    "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json", "*kd_state.json", "manifest.json",
    "training_args.bin", "global_step*", "latest", "zero_to_fp32.py", "pytorch_model_fsdp*",
)  # fmt: skip

# arXiv number and title.
_CLPD = ("2605.11260", "Curriculum Learning-Guided Progressive Distillation")
_DISTILLM = ("2402.03898", "DistiLLM: Towards Streamlined Distillation for Large Language Models")
_PLANS = {
    "pocl": ("2506.05695", "Being Strong Progressively!"),
    "clpd": _CLPD,
    "progressive": _CLPD,
    "pretrain": ("2605.23857", "Strong Teacher Not Needed? On Distillation in LLM Pretraining"),
}
_DIVERGENCES = {
    "forward_kl": ("1503.02531", "Distilling the Knowledge in a Neural Network"),
    "reverse_kl": ("2306.08543", "MiniLLM"),
    "skew_forward_kl": _DISTILLM,
    "skew_reverse_kl": _DISTILLM,
    "jsd": ("2306.13649", "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes"),
    "tvd": ("2307.15190", "f-Divergence Minimization for Sequence-Level Knowledge Distillation"),
    "alpha_beta": ("2505.04560", "ABKD"),
    "adaptive_kl": ("2404.02657", "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models"),
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CardFacts:
    """What a trainer that is handed models and rows cannot know; paths are never published, only their last part is.

    Attributes:
        student: the model that the student began as: a hub id or a path. teachers: the same, by name.
        student_note: what was done to it, as in "12 of its layers".
        train, eval: the data: a hub id or a path.
    """

    student: str | None = None
    student_note: str = ""
    teachers: Mapping[str, str] = field(default_factory=dict)
    train: str | None = None
    eval: str | None = None


def hub_id(name: str | os.PathLike | None) -> str | None:
    """``name``, if it is that of a repository on the hub; None for what is a path here."""
    text = "" if name is None else os.fspath(name)
    if not text or Path(text).exists():
        return None
    try:
        validate_repo_id(text)
    except HFValidationError:
        return None
    return text


def public_name(name: str | os.PathLike | None) -> str:
    """A hub id as it is, of a path the last part."""
    return hub_id(name) or ("" if name is None else Path(os.fspath(name)).name)


def model_card(
    trainer: Any,
    *,
    adapter: bool = False,
    model_name: str | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    tags: str | Sequence[str] | None = None,
    finetuned_from: str | None = None,
    tasks: str | Sequence[str] | None = None,
    dataset: str | Sequence[str] | None = None,
    dataset_tags: str | Sequence[str] | None = None,
    dataset_args: str | Sequence[str] | None = None,
) -> str:
    """The text of a model card: the hub's metadata, teachers, student, data, plan, loss, metrics before and after, versions, papers.

    Args:
        trainer: a `fastkd.trainer.KDTrainer`; what it cannot know is in its ``card_facts``.
        adapter: the weights are an adapter's, to be loaded with peft.
        model_name, ...: as in `transformers.Trainer.create_model_card`; dataset_args are names of configurations, for the text alone.
    """
    facts: CardFacts = trainer.card_facts
    student = finetuned_from or facts.student or getattr(_config(trainer), "_name_or_path", "") or None
    teachers = {name: facts.teachers.get(name, "") for name in _taught_by(trainer)}
    model_name = model_name or public_name(trainer.hub_model_id or trainer._folder.absolute().name)
    data = _listed(dataset) or ([facts.train] if facts.train else [])
    data_ids = [found for name in [*data, *_listed(dataset_tags)] if (found := hub_id(name)) is not None]
    options: dict[str, Any] = {
        "base_model": hub_id(student),
        "base_model_relation": "adapter" if adapter and hub_id(student) else None,
        "datasets": list(dict.fromkeys(data_ids)) or None,
        "language": language,
        "library_name": "peft" if adapter else "transformers",
        "license": license,
        "pipeline_tag": (_listed(tasks) or ["text-generation"])[0],
        "tags": list(dict.fromkeys([*_listed(tags), "fastkd", "knowledge-distillation", *(["lora"] if adapter else [])])),
    }
    metadata = ModelCardData(**{name: value for name, value in options.items() if value is not None})
    sections = [
        f"# {model_name}",
        _summary(trainer, student, teachers, facts, adapter),
        f"## Use\n\n{_use(trainer, model_name, adapter)}",
        f"## Results\n\n{_results(trainer)}",
        f"## Training\n\n{_training(trainer, data, dataset_args, facts)}",
        f"## Versions\n\n{_versions(adapter)}",
        f"## Papers\n\n{_papers(trainer)}",
    ]
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _summary(trainer: Any, student: str | None, teachers: Mapping[str, str], facts: CardFacts, adapter: bool) -> str:
    what = "An adapter" if adapter else "A causal language model"
    lines = [f"{what}, distilled with fastkd {__version__}.", ""]
    note = f", {facts.student_note}" if facts.student_note else ""
    lines.append(f"- student: {_named(student) or type(_bare(trainer)).__name__}{note}, {_size(trainer):,} parameters")
    for name, source in teachers.items():
        title = "teacher" if len(teachers) == 1 else f"teacher {name}"
        lines.append(f"- {title}: {_named(source) or name}")
    if not teachers:
        lines.append("- teacher: none")
    return "\n".join(lines)


def _use(trainer: Any, model_name: str, adapter: bool) -> str:
    where = trainer.hub_model_id or model_name
    needs = "With `pip install peft`:\n\n" if adapter else ""
    return f"""{needs}```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{where}")
tokenizer = AutoTokenizer.from_pretrained("{where}")
```"""


def _results(trainer: Any) -> str:
    path = trainer._folder / METRICS
    evals = [row for row in read_metrics(path) if "eval_ce" in row] if path.exists() else []
    if not evals:
        return "Not evaluated on held-out rows."
    steps = {row["step"]: row for row in evals}  # the last of a step
    shown = [steps[step] for step in dict.fromkeys((min(steps), max(steps)))]
    head = ["on held-out rows", *(f"step {row['step']:,}" for row in shown)]
    body = [[EVALUATION[c], *(format_metric(c, row.get(c)) for row in shown)] for c in EVALUATION if any(c in row for row in shown)]
    tokens = shown[-1].get("eval_tokens")
    note = f"Over {tokens:,} counted tokens; at temperature 1, but for the training objective, which is the plan's last." if tokens else ""
    return f"{_markdown(head, body)}\n\n{note}".rstrip()


def _training(trainer: Any, data: Sequence[str], dataset_args: Any, facts: CardFacts) -> str:
    args, schedule, plan = trainer.args, trainer.schedule, trainer.plan
    samples = schedule.samples
    counted = sum(samples.lengths if samples.counted is None else samples.counted)
    rows = f"{len(samples):,} rows, {sum(samples.lengths):,} tokens, {counted:,} of them counted in the loss"
    names = ", ".join(_named(name) for name in data)
    config = f" ({', '.join(_listed(dataset_args))})" if dataset_args else ""
    lines = [f"- data: {names + config + ': ' if names else ''}{rows}; at most {args.max_length} tokens of a row"]
    if facts.eval:
        lines.append(f"- held-out data: {_named(facts.eval)}")
    lines.append(f"- loss: {_loss(args)}")
    scheduler = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    optimizer = getattr(args.optim, "value", args.optim)
    lines.append(f"- optimizer: {optimizer}, learning rate {args.learning_rate:g} ({scheduler}), weight decay {args.weight_decay:g}")
    lines.append(f"- {trainer.state.global_step:,} of {schedule.total_steps:,} steps of {schedule.batch_size} rows, seed {schedule.seed}")
    return "\n".join(lines) + f"\n\nThe plan{f', {plan.name}' if plan.name else ''}:\n\n" + _markdown(*stage_table(schedule.table()))


def _loss(args: Any) -> str:
    parameters = ", ".join(f"{name} {value:g}" for name, value in (args.divergence_parameters or {}).items())
    squared = " times temperature squared" if args.temperature_squared else ""
    divergence = args.divergence + (f" ({parameters})" if parameters else "")
    return f"(1 - kd_ratio) * cross-entropy + kd_ratio * {divergence}{squared}"


def _versions(adapter: bool) -> str:
    return "\n".join(f"- {name} {version}" for name, version in versions(adapter).items())


def versions(peft: bool = False) -> dict[str, str]:
    """Of the packages on which a run's results may depend."""
    names = ["torch", "transformers", "datasets", "accelerate", *(["peft"] if peft else [])]
    return {"fastkd": __version__, **{name: importlib.metadata.version(name) for name in names}}


def _papers(trainer: Any) -> str:
    found = [_PLANS.get(trainer.plan.name or "")] + ([_DIVERGENCES.get(trainer.args.divergence)] if _taught_by(trainer) else [])
    return "\n".join(f"- {title}, [arXiv:{number}](https://arxiv.org/abs/{number})" for number, title in filter(None, found)) or "None."


def _taught_by(trainer: Any) -> list[str]:
    """The teachers of the stages that the run comes to."""
    return list(dict.fromkeys(row["teacher"] for row in trainer.schedule.table() if row["teacher"]))


def _bare(trainer: Any) -> Any:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _config(trainer: Any) -> Any:
    return getattr(_bare(trainer), "config", None)


def _size(trainer: Any) -> int:
    """Parameters, without those of an adapter, which may be merged."""
    model = _bare(trainer)
    return model.num_parameters() - sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def _named(name: str | None) -> str:
    found = hub_id(name)
    return f"[{found}](https://huggingface.co/{found})" if found else public_name(name)


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


# To the hub.


class HubTrainer(Trainer):
    """A `Trainer` that writes `model_card` and pushes the student, not all that is in its folder.

    `push_to_hub`, ``args.push_to_hub``, ``hub_model_id`` and ``hub_strategy`` are as in `Trainer`. Checkpoints, a store of teacher signals,
    scores, the plan, which names the user's files, and the pickled arguments stay here, except that with ``hub_strategy`` "checkpoint" and
    "all_checkpoints" a whole checkpoint is pushed too, into ``last-checkpoint`` or a folder of its name.
    """

    card_facts = CardFacts()
    push_in_progress: Any = None

    def create_model_card(
        self,
        language=None,
        license=None,
        tags=None,
        model_name=None,
        finetuned_from=None,
        tasks=None,
        dataset_tags=None,
        dataset=None,
        dataset_args=None,
    ) -> None:
        """Write ``output_dir/README.md``; arguments as in `Trainer`. Whether it is an adapter's card, the files beside it say."""
        if self.is_world_process_zero():
            _write_card(
                self,
                Path(str(self.args.output_dir)),
                language=language,
                license=license,
                tags=tags,
                model_name=model_name,
                finetuned_from=finetuned_from,
                tasks=tasks,
                dataset_tags=dataset_tags,
                dataset=dataset,
                dataset_args=dataset_args,
            )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> Any:
        """Save the model and push it with its tokenizer, card, metrics and report; arguments as in `Trainer`, kwargs for the card."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:  # args.push_to_hub is off
            before = self.args.hub_private_repo
            self.args.hub_private_repo = before if private is None else private
            self.init_hf_repo(token=token)
            self.args.hub_private_repo = before
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = [*_listed(kwargs.pop("tags", None)), *_listed(getattr(self.model, "model_tags", None))]
        self.create_model_card(tags=tags, **kwargs)
        return self.push_folder(commit_message or "End of training", token=token, revision=revision, blocking=blocking)

    def push_folder(self, message: str, *, token: str | None = None, revision: str | None = None, blocking: bool = True) -> Any:
        """Push ``output_dir`` as it is. On the main process alone.

        Where it holds a whole model, files of an adapter that were pushed during training are removed from the repository.
        """
        args, folder = self.args, Path(str(self.args.output_dir))
        self._finish_current_push()
        store, kept_back = (getattr(args, "store", None) or {}).get("path"), [*_KEPT_BACK]
        if store is not None and Path(store).resolve().is_relative_to(folder.resolve()):
            kept_back.append(f"{Path(store).resolve().relative_to(folder.resolve()).as_posix()}/*")
        upload: Any = HfApi().upload_folder
        return upload(
            repo_id=str(self.hub_model_id),
            folder_path=folder,
            commit_message=message,
            token=token if token is not None else args.hub_token,
            revision=revision if revision is not None else args.hub_revision,
            run_as_future=not blocking,
            ignore_patterns=kept_back,
            delete_patterns=None if (folder / ADAPTER).exists() else ["adapter_config.json", "adapter_model.*"],
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args, running = self.args, self.push_in_progress
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if running is not None and not running.is_done():
            if not args.hub_always_push:
                return
        else:
            self._remove_staged()
        self.callback_handler.on_push_begin(args, self.state, self.control)
        # Links with names of their own: the checkpoint may be deleted while it is still uploaded.
        checkpoint = Path(checkpoint_folder)
        staged = Path(str(args.output_dir)) / f"{_STAGED}{checkpoint.name}"
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(checkpoint, staged, ignore=shutil.ignore_patterns(*_STATES), copy_function=_link)
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            whole = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            shutil.copytree(checkpoint, staged / whole, copy_function=_link)
        _write_card(self, staged)
        job = HfApi().upload_folder(
            repo_id=str(self.hub_model_id),
            folder_path=staged,
            commit_message=f"Training in progress, step {self.state.global_step}",
            token=args.hub_token,
            revision=args.hub_revision,
            run_as_future=True,
        )
        job.add_done_callback(functools.partial(_say_failed, checkpoint.name))
        if running is None or running.is_done():
            self.push_in_progress = PushInProgress([job])  # type: ignore[arg-type]
        else:
            running.jobs.append(job)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._remove_staged()

    def _remove_staged(self) -> None:
        if self.is_world_process_zero():
            for folder in Path(str(self.args.output_dir)).glob(f"{_STAGED}*"):
                shutil.rmtree(folder, ignore_errors=True)


def _say_failed(name: str, job: Any) -> None:
    """Nobody looks at what an upload in the background returns."""
    if not job.cancelled() and job.exception() is not None:
        logger.warning("push_to_hub: %s was not pushed: %s", name, job.exception())


def _link(source: str, target: str) -> None:
    """A second name takes no room; where the file system has none, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _write_card(trainer: HubTrainer, folder: Path, **given: Any) -> None:
    write_whole(folder / CARD, model_card(trainer, adapter=(folder / ADAPTER).exists(), **given))
